"""What is said of the rows that become token ids."""

import json
from types import SimpleNamespace

import pytest

from src.data.encoding import comparisons, ppo_prompts, scored_sequences, solver_sequences
from src.errors import UserError

BOS, EOS = 1, 2


@pytest.fixture
def tokenizer():
    """A token for each letter; blanks have none."""

    def ids(text: str) -> list[int]:
        return [ord(c) for c in text if c.isalpha()]

    return SimpleNamespace(
        prompt_ids=lambda text: [BOS, *ids(text)],
        response_ids=lambda text, sampled=False: [*ids(text), EOS],
    )


@pytest.fixture
def file(tmp_path):
    def make(*rows: dict) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    return make


def row(output, **more) -> dict:
    return {"instruction": "say", "output": output} | more


def test_rows_that_are_alike_too_long_or_without_a_token_are_counted(file, tokenizer):
    rows = [row("a", id=1), row("a", id=2), row(["b", "..."]), row("c" * 9), row(["b", "a"])]
    path = file(*rows)
    sequences, notes = solver_sequences(path, tokenizer, 8)
    assert len(sequences) == 6, "of 7 answers one is too long"
    assert notes == [
        f"{path}: 1 field is not used: id (in 2 of 5 rows)",
        f"1 of 7 rows of {path} are longer than --max_seq_len 8 (up to 14) and are left out",
        f"1 of 7 rows of {path} have an answer without a token of its own",
        f"3 of 7 rows of {path} say what a row before them says",
    ]
    assert solver_sequences(file(row("a"), row("b")), tokenizer, 8)[1] == []
    with pytest.raises(UserError, match="1 of 7 rows"):
        solver_sequences(file(*rows), tokenizer, 8, must_fit=True)


def test_a_short_answer_is_not_empty_where_the_template_writes_more(file):
    """What stands before every answer belongs to none."""
    own = SimpleNamespace(
        prompt_ids=lambda text: [BOS],
        response_ids=lambda text, sampled=False: (
            [7] + [ord(c) for c in text] + [EOS] if len(text) != 1 else [ord(text), EOS]
        ),
    )
    assert solver_sequences(file(row("a"), row("bc")), own, 8)[1] == []
    path = file(row("..."), row("bc"))
    nothing = [7, EOS]
    own.response_ids = lambda text, sampled=False: [
        *nothing[:1],
        *(ord(c) for c in text.strip(".")),
        EOS,
    ]
    assert solver_sequences(path, own, 8)[1] == [
        f"1 of 2 rows of {path} have an answer without a token of its own"
    ]


def test_pairs_that_cannot_teach_are_counted(file, tokenizer):
    def pair(chosen, rejected):
        return {"instruction": "say", "chosen": chosen, "rejected": rejected}

    # The third is alike only once it is ids.
    path = file(pair("a", "b"), pair("a", ["b", "a"]), pair("a b", "ab"), pair("a", "b"))
    pairs, notes = comparisons(path, tokenizer, 8)
    assert len(pairs) == 4
    assert notes == [
        f"2 of 4 rows of {path} have one text on both sides, chosen and rejected: it teaches "
        "nothing",
        f"1 of 4 rows of {path} say what a row before them says",
    ]
    assert comparisons(file(pair("a", "b"), pair("b", "a")), tokenizer, 8)[1] == []


def test_a_pair_that_differs_past_the_limit_is_left_out_whole(file, tokenizer):
    """Cut there, both sides would be one text."""
    sides = ("a" * 9 + end for end in "bc")
    long = dict(zip(("instruction", "chosen", "rejected"), ("say", *sides)))
    short = {"instruction": "say", "chosen": "a", "rejected": "b"}
    path = file(long, short)
    pairs, notes = comparisons(path, tokenizer, 8)
    assert [len(s.tokens) <= 8 for c in pairs for s in c.responses] == [True, True]
    assert len(notes) == 1 and notes[0].startswith(f"1 of 2 rows of {path} are longer than ")


def test_prompts_are_alike_when_whole_rows_are(file, tokenizer):
    rows = [{"instruction": "say", "label": 1}, {"label": 1, "instruction": "say"}]
    path = file(*rows, {"instruction": "say", "label": 2, "level": 3})
    prompts, notes = ppo_prompts(path, tokenizer, None, 8)
    assert len(prompts) == 3
    assert notes == [
        f"{path}: 1 field is not used: level (in 1 of 3 rows)",
        f"1 of 3 rows of {path} say what a row before them says",
    ]
    assert ppo_prompts(path, tokenizer, None, 8, rows_are_read=True)[1] == notes[1:]


def test_rows_to_score_bring_their_notes(file, tokenizer):
    path = file(row("a", id=1))
    sequences, notes = scored_sequences(path, tokenizer, 8)
    assert len(sequences) == 1 and notes == [f"{path}: 1 field is not used: id (in 1 of 1 rows)"]


def test_what_a_model_wrote_is_scored_whatever_it_is(file, tokenizer):
    path = file(row(""), row("a\0b"))
    sequences, _ = scored_sequences(path, tokenizer, 8)
    prompt = [BOS, *map(ord, "say")]
    assert [list(s.tokens) for s in sequences] == [
        [*prompt, EOS],
        [*prompt, ord("a"), ord("b"), EOS],
    ]
