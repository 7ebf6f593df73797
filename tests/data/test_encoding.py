"""What is said of the rows that become token ids."""

import json
from types import SimpleNamespace

import pytest

from src.data.encoding import (
    PairRules,
    comparisons,
    graded_rows,
    labelled,
    ppo_prompts,
    scored_sequences,
    solver_sequences,
    step_places,
)
from src.errors import UserError
from src.models.batch import Sequence

BOS, EOS = 1, 2


@pytest.fixture
def tokenizer():
    """A token for each letter; blanks have none."""

    def ids(text: str) -> list[int]:
        return [ord(c) for c in text if c.isalpha()]

    return SimpleNamespace(
        prompt_ids=lambda text: [BOS, *ids(text)],
        response_ids=lambda text, sampled=False: [*ids(text), EOS],
        decode=lambda ids: "".join(chr(i) for i in ids if i > EOS),
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


def ranked(*outputs, **more) -> dict:
    return {"instruction": "say", "ranked": list(outputs), **more}


def pairs_of(path, tokenizer, rules) -> list[list[tuple[str, str]]]:
    """Each row's pairs as texts, better first."""

    def text(c, place):
        s = c.responses[place]
        return tokenizer.decode(s.tokens[s.prompt_length :])

    found = comparisons(path, tokenizer, 99, False, rules)[0]
    return [[(text(c, a), text(c, b)) for a, b in c.pairs] for c in found]


def test_a_ranking_is_all_pairs_or_the_best_against_each(file, tokenizer):
    path = file(ranked("a", "b", "c"), ranked("b", "a"))
    assert pairs_of(path, tokenizer, PairRules()) == [
        [("a", "b"), ("a", "c"), ("b", "c")],
        [("b", "a")],
    ]
    assert pairs_of(path, tokenizer, PairRules("best")) == [[("a", "b"), ("a", "c")], [("b", "a")]]


def test_ties_by_score_are_no_pairs_and_a_row_of_ties_is_left_out(file, tokenizer):
    path = file(ranked("a", "b", "c", scores=[2, 1, 1]), ranked("a", "b", scores=[1, 1]))
    found, notes = comparisons(path, tokenizer, 99)
    assert len(found) == 1 and found[0].pairs == [(0, 1), (0, 2)]
    assert notes == [f"1 of 2 rows of {path} have no pair but ties"]
    with pytest.raises(UserError, match="has no pair of outputs of which one is better"):
        comparisons(file(ranked("a", "b", scores=[1, 1])), tokenizer, 99)


@pytest.mark.parametrize("scores", [[1, 2], [1], [3, 2, 1]])
def test_scores_that_do_not_go_with_the_ranking_are_refused(file, tokenizer, scores):
    with pytest.raises(UserError, match="rows.jsonl:2: scores are"):
        comparisons(file(ranked("a", "b"), ranked("a", "b", scores=scores)), tokenizer, 99)


def test_so_many_pairs_of_a_prompt_are_drawn_by_the_seed(file, tokenizer):
    row = {"instruction": "say", "chosen": ["a", "b", "c"], "rejected": ["ab", "ba"]}
    path = file(row, row | {"instruction": "go"})
    drawn = [pairs_of(path, tokenizer, PairRules(most=2, seed=seed)) for seed in range(9)]
    whole = pairs_of(path, tokenizer, PairRules())
    assert [len(pairs) for pairs in whole] == [6, 6]
    for rows in drawn:
        assert all(len(row) == 2 and set(row) <= set(every) for row, every in zip(rows, whole))
    assert len({str(rows) for rows in drawn}) > 3
    assert drawn[4] == pairs_of(path, tokenizer, PairRules(most=2, seed=4))
    # Responses that no pair is of are gone.
    for c in comparisons(path, tokenizer, 99, False, PairRules(most=1))[0]:
        assert len(c.responses) == 2 and c.pairs == [(0, 1)]


def test_equal_sides_are_refused_where_they_must_differ(file, tokenizer):
    """Also where only the ids are."""
    good = {"instruction": "say", "chosen": "a", "rejected": "b"}
    path = file(good, good | {"chosen": "a b", "rejected": ["b", "ab"]})
    with pytest.raises(UserError, match="rows.jsonl:2: one text is better and worse than"):
        comparisons(path, tokenizer, 99, rules=PairRules(must_differ=True))


def test_labels_come_from_rows_or_from_sides(file, tokenizer):
    path = file(
        {"instruction": "say", "output": "a", "label": True},
        {"instruction": "say", "output": "b", "label": False},
    )
    assert [row.labels for row in labelled(path, tokenizer, 99)[0]] == [[True], [False]]
    path = file({"instruction": "say", "chosen": ["a", "ab"], "rejected": "b"})
    assert labelled(path, tokenizer, 99)[0][0].labels == [True, True, False]
    one = {"instruction": "say", "output": "a", "label": False}
    with pytest.raises(UserError, match="every row's label is false; good and bad outputs are"):
        labelled(file(one, one), tokenizer, 99)
    with pytest.raises(UserError, match="1 of 1 rows rank more than two outputs: one between is"):
        labelled(file(ranked("a", "b", "ab")), tokenizer, 99)


@pytest.mark.parametrize(
    "pieces, places",
    [
        (["a", "b", ".", "c", ".", "d", ""], [2, 4, 6]),
        (["ab.", "c", ". d", "e", ""], [0, 2, 4]),
        (["a", ".", "b", ".", ""], [1, 4]),  # nothing behind the last separator
        (["a", "b", ""], [2]),
        (["a.b", ".c", ""], [0, 1, 2]),
        (["a", ".", ".", "b", ""], [1, 4]),  # separators in a row are one
        (["a", "..", " .", "b", ". .", ""], [1, 5]),
        ([".", "a.b.", "c", ""], [1, 1, 3]),  # two steps may end in one token
        (["", ""], [1]),
    ],
)
def test_a_step_ends_with_the_token_that_completes_its_separator(pieces, places):
    """Whatever else that token holds; the last step with the response's own last token."""
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(pieces[i] for i in ids))
    sequence = Sequence([*range(100, 103), *range(len(pieces))], 3)
    assert step_places(tokenizer, sequence, ".") == [3 + place for place in places]


def test_steps_and_grades_must_be_as_many(file, tokenizer):
    rows = [
        {"instruction": "say", "output": "axb", "scores": [1, 0.5]},
        {"instruction": "say", "output": "axb", "scores": [1]},
    ]
    read = (tokenizer, 99, False, "pointwise", "x")
    assert graded_rows(file(rows[0]), *read)[0][0].grades == [1, 0.5]
    with pytest.raises(UserError, match="rows.jsonl:2: has 1 scores for 2 steps"):
        graded_rows(file(*rows), *read)
    flat = [{"instruction": "say", "output": x, "label": True} for x in "ab"]
    with pytest.raises(UserError, match="every label is 1: there is nothing to tell apart"):
        graded_rows(file(*flat), tokenizer, 99, False, "classification", None)


def test_a_tie_with_the_best_is_in_no_pair_and_left_out(file, tokenizer):
    """Else it would be labelled a bad one, though it is as good."""
    path = file(ranked("a", "b", "ab", scores=[1, 1, 0]))
    (row,), _ = labelled(path, tokenizer, 99, rules=PairRules("best"))
    texts = [tokenizer.decode(s.tokens[s.prompt_length :]) for s in row.responses]
    assert texts == ["a", "ab"] and row.labels == [True, False]
