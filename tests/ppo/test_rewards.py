"""What a response earns, by each of the rewards."""

import asyncio
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src.errors import UserError
from src.evaluation.tasks import find_task
from src.ppo.rewards import RewardFailed, rule
from src.ppo.rewards.file import ROWS_AT_ONCE, FileReward, UserScore, load_score
from src.ppo.rewards.format import FormatReward
from src.ppo.rewards.length import LengthReward
from src.ppo.rewards.overlong import OverlongReward
from src.ppo.rewards.rule import RuleReward
from src.ppo.rewards.verifier import VerifierReward, translator
from src.ppo.roles import Role
from src.settings.declaration import build, find_problems
from src.settings.ppo import PPOTrainSettings, RewardSettings
from tests.ppo.test_rollouts import buffer_of
from tests.trainer.tiny import EOS, ours, padded, theirs

RESPONSES = [[7, 8, EOS], [9, 10, 11, 12, 13], [EOS]]
CUT = [False, True, False]


def telling(texts: dict[int, str]):
    """A tokenizer that reads a response's first token."""
    return SimpleNamespace(decode=lambda ids: texts[ids[0]])


def classifier(folder, sequences: list[list[int]]) -> torch.Tensor:
    ids, mask = padded(sequences)
    with torch.no_grad():
        return theirs(folder / "verifier")(input_ids=ids, attention_mask=mask).logits.squeeze(-1)


def verifier(folder, parallel, **how) -> VerifierReward:
    model = ours(folder / "verifier", parallel).requires_grad_(False)
    return VerifierReward(Role("reward", model, parallel), parallel, **dict(max_batch_size=2) | how)


# --- the verifier ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"max_batch_size": 8}, {"max_tokens": 9}])
def test_the_verifier_s_reward_is_transformers_classifier_s(folder, parallel, how):
    buffer = buffer_of(RESPONSES, CUT)
    want = classifier(folder, [[1, 5, 6, *r] for r in RESPONSES])
    assert torch.allclose(verifier(folder, parallel, **how)(buffer), want, atol=1e-5)


def test_scores_are_centred_and_scaled_by_what_lies_beside_the_verifier(folder, parallel):
    plain, scaled = (
        verifier(folder, parallel, **how)(buffer_of(RESPONSES))
        for how in ({}, {"mean": 0.7, "std": 2.5})
    )
    assert torch.allclose(scaled, (plain - 0.7) / 2.5, atol=1e-6) and not scaled.requires_grad


def test_a_verifier_with_another_tokenizer_reads_the_texts(folder, parallel):
    """The instruction as its own prompt, the response as its own ids.

    Its EOS only where the policy ended by itself.
    """
    texts = {7: "ab", 9: "bcd", EOS: ""}
    own = SimpleNamespace(
        prompt_ids=lambda text: [1, *(20 + ord(c) % 16 for c in text)],
        response_ids=lambda text, sampled, ended=True: [
            *(40 + ord(c) % 16 for c in text),
            *([63] if ended else []),
        ],
    )
    rows = [{"instruction": text} for text in ("x", "yz", "w?")]
    buffer = buffer_of(RESPONSES, CUT, rows=rows)
    got = verifier(folder, parallel, translate=translator(telling(texts), own), mean=0.5, std=2.0)(
        buffer
    )
    sequences = [
        own.prompt_ids(row["instruction"]) + own.response_ids(texts[r[0]], sampled=True)
        for row, r in zip(rows, RESPONSES)
    ]
    assert sequences[1].pop() == 63
    assert torch.allclose(got, (classifier(folder, sequences) - 0.5) / 2.0, atol=1e-5)


# --- rules ----------------------------------------------------------------------------------------


def test_the_rule_s_reward_is_the_grader_s():
    """On the response's text alone, by the task's headline rule, up to the answer's end."""
    task, texts = (
        find_task("GSM8K"),
        {7: "so #### 12", 8: "it is 12", 9: "#### 13", 10: "Question: 6 + 6? #### 12"},
    )
    buffer = buffer_of([[7, EOS], [8], [9, EOS], [10]], gold="12")
    got = RuleReward(task, telling(texts))(buffer)
    assert got.tolist() == [float(task.grade(t, "12")[task.metric]) for t in texts.values()]
    assert got.tolist() == [1.0, 0.0, 0.0, 1.0] and got.dtype == torch.float32
    numeric = RuleReward(find_task("GSM8K", "numeric"), telling(texts))(buffer)
    assert numeric.tolist() == [1.0, 1.0, 0.0, 1.0]


def test_what_follows_the_answer_earns_nothing():
    texts = {7: "the answer is 12\n\nQuestion: 1 + 1?\n#### 2", 8: "Q: 1 + 1?\n#### 2"}
    got = RuleReward(find_task("GSM8K"), telling(texts))(buffer_of([[7], [8]], gold="2"))
    assert got.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_ranks_of_a_model_share_the_grading(size, monkeypatch):
    """Each grades its rows alone, and the sum is what one rank gives."""
    texts = {7: "#### 12", 8: "it is 12", 9: "#### 13", 10: "#### 12"}
    buffer = buffer_of([[i] for i in texts], gold="12")
    monkeypatch.setattr(rule, "agreed", lambda find: find())
    parts = []
    monkeypatch.setattr(rule.dist, "all_reduce", lambda scores, group: parts.append(scores))
    for rank in range(size):
        ranks = SimpleNamespace(model_rank=rank, model_size=size, model_group=None)
        RuleReward(find_task("GSM8K"), telling(texts), ranks)(buffer)
    assert torch.stack(parts).sum(0).tolist() == [1.0, 0.0, 0.0, 1.0]
    assert all(part[i] == 0 for r, part in enumerate(parts) for i in range(4) if i % size != r)


def test_the_format_s_reward_is_one_where_the_pattern_is_found():
    texts = {7: "<think>\n2\n</think> 4", 8: "4", 9: "<think> 4"}
    got = FormatReward(r"<think>.*</think>", telling(texts))(buffer_of([[7], [8], [9]]))
    assert got.tolist() == [1.0, 0.0, 0.0] and got.dtype == torch.float32
    with pytest.raises(UserError, match=r"--format_pattern \(: is no regular expression"):
        build(RewardSettings, dict(reward=["format"], format_pattern="("))


def test_the_length_s_reward_is_a_share_and_the_overlong_s_a_soft_punishment():
    """DAPO, equation 13, with L_max 8 and L_cache 4."""
    lengths = list(range(1, 9))
    buffer = buffer_of([[7] * n for n in lengths])
    assert LengthReward(8)(buffer).tolist() == [n / 8 for n in lengths]
    want = [0.0 if n <= 4 else (4 - n) / 4 if n <= 8 else -1.0 for n in lengths]
    assert OverlongReward(8, 4)(buffer).tolist() == want and want[-1] == -1.0
    assert OverlongReward(6, 2)(buffer).tolist() == [0.0, 0.0, 0.0, 0.0, -0.5, -1.0, -1.0, -1.0]


# --- a user's function ----------------------------------------------------------------------------


def file_reward(parallel, score, tokenizer=None):
    return FileReward(
        "mine.py:score",
        score,
        tokenizer or SimpleNamespace(decode=lambda ids: f"text {ids[0]}"),
        parallel,
    )


def test_a_user_s_function_gets_prompts_responses_and_rows_in_batches(parallel):
    calls, n = [], ROWS_AT_ONCE + 3
    rows = [{"instruction": f"question {i}", "label": str(i)} for i in range(n)]

    def score(prompts, responses, given):
        calls.append((prompts, responses, [dict(row) for row in given]))
        for row in given:
            row.clear()  # what it does to them is its own affair
        return [int(prompt.split()[1]) / 2 for prompt in prompts]

    buffer = buffer_of([[3 + i % 60, EOS] for i in range(n)], rows=[dict(row) for row in rows])
    got = file_reward(parallel, score)(buffer)
    assert got.tolist() == [i / 2 for i in range(n)] and got.dtype == torch.float32
    assert [len(prompts) for prompts, *_ in calls] == [ROWS_AT_ONCE, 3]
    assert sum((prompts for prompts, *_ in calls), []) == [row["instruction"] for row in rows]
    assert sum((responses for _, responses, _ in calls), []) == [
        f"text {3 + i % 60}" for i in range(n)
    ]
    assert (
        sum((given for *_, given in calls), []) == rows == [prompt.row for prompt in buffer.prompts]
    )


@pytest.mark.parametrize(
    "answer, said",
    [
        ([1.0], "returned 1 numbers for 3 responses"),
        ([1.0] * 4, "returned 4 numbers for 3 responses"),
        ([1.0, float("nan"), 2.0], "returned nan"),
        ([float("inf")] * 3, "returned inf"),
        ([1.0, 1e39, 2.0], "returned 1e+39 for responses[1], 'text 9'"),
        ([1.0, 10**400, 2.0], "for responses[1]"),
        ([1.0, 2.0, "1.0"], "returned '1.0' (str) for responses[2], 'text 2'"),
        ([[1.0], [2.0], [3.0]], "returned [1.0] (list) for responses[0], 'text 7'"),
        (torch.ones(3, 1), "returned [1.0] (list) for responses[0]"),
        ([1.0, 2.0, {"score": 1}], "returned {'score': 1} (dict) for responses[2]"),
        (None, "returned None; a list is expected, with a finite number, or None (no opinion)"),
        (1.0, "returned 1.0; a list is expected"),
        (torch.tensor(1.0), "(Tensor); a list is expected"),
        ("123", "returned '123' (str); a list"),
        ({"a": 1, "b": 2, "c": 3}, "(dict); a list"),
        ({1.0, 2.0, 3.0}, "(set); a list"),
    ],
)
def test_what_is_no_number_for_each_response_is_refused(parallel, answer, said):
    with pytest.raises(UserError, match="--reward_file mine.py:score: ") as refusal:
        file_reward(parallel, lambda *_: answer)(
            buffer_of(RESPONSES, rows=[{"instruction": "q"}] * 3)
        )
    assert said in str(refusal.value)


def test_what_a_user_s_function_returns_may_be_a_tensor_or_booleans(parallel):
    buffer = buffer_of(RESPONSES, rows=[{"instruction": "q"}] * 3)
    for answer in (
        torch.tensor([1.0, 0.0, 2.0]),
        torch.tensor([1, 0, 2]),
        torch.tensor([1, 0, 2], dtype=torch.bfloat16),
        np.array([1.0, 0.0, 2.0], dtype=np.float32),
        [np.float32(1), np.int64(0), torch.tensor(2.0)],
        (True, False, 2),
        [np.bool_(True), 0, 2],
    ):
        assert file_reward(parallel, lambda *_, answer=answer: answer)(buffer).tolist() == [
            1.0,
            0.0,
            2.0,
        ]
    lazily = file_reward(parallel, lambda prompts, *_: (float(i) for i in range(len(prompts))))
    assert lazily(buffer).tolist() == [0.0, 1.0, 2.0]


def test_a_user_s_function_may_have_to_be_awaited(parallel):
    """Also one that returns a coroutine; what it keeps between calls stays in one loop."""
    n, loops = ROWS_AT_ONCE + 2, []

    async def judge(text):
        await asyncio.sleep(0)
        return float(text.split()[1])

    async def score(prompts, responses, rows):
        loops.append(asyncio.get_running_loop())
        return await asyncio.gather(*map(judge, responses))

    buffer = buffer_of([[i] for i in range(n)], rows=[{"instruction": "q"}] * n)
    want = [float(i) for i in range(n)]
    assert file_reward(parallel, score)(buffer).tolist() == want
    assert file_reward(parallel, lambda *given: score(*given))(buffer).tolist() == want
    assert len(loops) == 4 and loops[0] is loops[1] is not loops[2]

    async def fails(prompts, responses, rows):
        return rows[0]["labels"]

    with pytest.raises(UserError, match="KeyError: 'labels'"):
        file_reward(parallel, fails)(buffer)


def test_none_is_no_opinion(parallel):
    buffer = buffer_of(RESPONSES, rows=[{"instruction": "q"}] * 3)
    got = file_reward(parallel, lambda *_: [None, 2, None])(buffer)
    assert got.isnan().tolist() == [True, False, True] and float(got[1]) == 2.0


@pytest.mark.parametrize("leaves", [SystemExit(), SystemExit(3), asyncio.CancelledError()])
def test_leaving_is_a_failure_and_ctrl_c_is_none(parallel, leaves):
    buffer = buffer_of(RESPONSES, rows=[{"instruction": "q"}] * 3)

    def score(*_):
        raise leaves

    with pytest.raises(RewardFailed, match=f"{type(leaves).__name__}: {leaves}"):
        file_reward(parallel, score)(buffer)
    leaves = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        file_reward(parallel, score)(buffer)


def test_the_line_where_a_user_s_function_fails_is_named(parallel, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def helper(row):\n    return row['labels']\n\ndef score(p, r, rows):\n    return "
        "[*map(helper, rows)]\n"
    )
    reward = FileReward(
        f"{path}:score",
        load_score(f"{path}:score"),
        SimpleNamespace(decode=lambda ids: ""),
        parallel,
    )
    with pytest.raises(UserError) as refusal:
        reward(buffer_of(RESPONSES, rows=[{"instruction": "q"}] * 3))
    assert (
        f"KeyError: 'labels' ({path}:2); rows[0] has no field 'labels': it has instruction"
        in str(refusal.value)
    )


def test_the_line_is_the_user_s_own_and_a_key_of_something_else_is_no_field(parallel, tmp_path):
    (path := tmp_path / "mine.py").write_text(
        "import json\n\ndef score(p, r, rows):\n    {row['label']: 1 for row in rows}['x']\n"
        "def parse(p, r, rows):\n    return [json.loads(text) for text in r]\n"
    )
    buffer = buffer_of(RESPONSES, rows=[{"instruction": "q", "label": "1", "x": ""}] * 3)
    for name, said in (
        ("score", f"mine.py:score: KeyError: 'x' ({path}:4)"),
        ("parse", f"({path}:6)"),
    ):
        where = f"{path}:{name}"
        reward = FileReward(
            where, load_score(where), SimpleNamespace(decode=lambda ids: "{"), parallel
        )
        with pytest.raises(RewardFailed) as refusal:
            reward(buffer)
        assert str(refusal.value).endswith(said)


# --- a user's function, before any work -----------------------------------------------------------

ROW = {"instruction": "1 + 1?", "label": "2"}


def test_a_function_is_tried_once_on_the_first_row():
    calls = []

    def score(prompts, responses, rows):
        calls.append((prompts, responses, [dict(row) for row in rows]))
        rows[0].clear()
        return [1.0, None, 0]

    UserScore("mine.py:score", score).try_out(row := dict(ROW))
    ((prompts, responses, rows),) = calls
    assert prompts == ["1 + 1?"] * 3 and rows == [ROW] * 3 and row == ROW
    assert len(set(responses)) == 3 and all(map(str.strip, responses))


@pytest.mark.parametrize(
    "body, said",
    [
        ("return [row['answer'] for row in rows]", "rows[0] has no field 'answer': it has instr"),
        ("return [1.0]", "returned 1 numbers for 3 responses"),
        ("return [1.0] * len(responses), 'why'", "returned 2 numbers for 3 responses"),
        ("return 1.0", "returned 1.0"),
        ("pass", "returned None"),
        ("import sys; sys.exit()", "SystemExit"),
        ("return [float(text) for text in responses]", "ValueError: could not convert"),
    ],
)
def test_what_fails_when_it_is_tried_is_told_as_such(tmp_path, body, said):
    path = tmp_path / "mine.py"
    path.write_text(f"def score(prompts, responses, rows):\n    {body}\n")
    where = f"{path}:score"
    with pytest.raises(UserError) as refusal:
        UserScore(where, load_score(where)).try_out(ROW)
    head = f"--reward_file {where}: called with three made-up answers before training: "
    assert str(refusal.value).startswith(head) and said in str(refusal.value)


@pytest.mark.parametrize(
    "signature, is_trl",
    [
        ("completions, **kwargs", True),
        ("prompts, completions, **kwargs", True),
        ("prompts, completions, answer, **kwargs", True),
        ("response", False),
        ("prompts, responses", False),
        ("prompts, responses, rows, model", False),
        ("prompts, responses, rows, *, model", False),
        ("*, prompts, responses, rows", False),
    ],
)
def test_a_function_of_another_signature_is_refused(tmp_path, signature, is_trl):
    (path := tmp_path / "mine.py").write_text(f"def score({signature}):\n    return [1.0]\n")
    with pytest.raises(UserError) as refusal:
        load_score(f"{path}:score")
    assert f": is score({signature}), and is called as score(prompts, responses, rows)" in str(
        refusal.value
    )
    assert ("That is how TRL calls its own" in str(refusal.value)) == is_trl


@pytest.mark.parametrize(
    "signature, said",
    [
        ("responses, prompts, rows", "its 'responses' would get the prompts"),
        ("completions, prompts, answer", "its 'completions' would get the prompts"),
        ("queries, prompts, labels", "its 'prompts' would get the responses"),  # OpenRLHF
        ("data_source, solution_str, ground_truth, extra_info=None", "'data_source'"),  # verl
        ("prompts, rows, responses", "its 'rows' would get the responses"),
        ("prompts, responses, extra_info", "its 'extra_info' would get the rows"),
    ],
)
def test_a_function_whose_arguments_stand_elsewhere_is_refused(tmp_path, signature, said):
    (path := tmp_path / "mine.py").write_text(f"def score({signature}):\n    return [1.0] * 3\n")
    with pytest.raises(UserError, match="is called as score") as refusal:
        load_score(f"{path}:score")
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "def score(a, b, c): ...",
        "def score(queries, completions, labels): ...",
        "def score(*given): ...",
        "def score(prompts, completions, rows): ...",
        "def score(prompts, responses, rows, weight=1.0): ...",
        "async def score(prompts, responses, rows): ...",
        "from functools import partial\ndef f(x, a, b, c): ...\nscore = partial(f, 1)",
        "class Score:\n    def __call__(self, a, b, c): ...\nscore = Score()",
        "score = max",  # its signature is nowhere to be read
    ],
)
def test_whatever_takes_three_lists_is_taken(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    load_score(f"{tmp_path}/mine.py:score")


@pytest.mark.parametrize(
    "where, text, said",
    [
        ("mine.py", None, "write FILE.py:FUNCTION"),
        ("mine:score", None, "write FILE.py:FUNCTION"),
        ("mine.py:not a name", None, "write FILE.py:FUNCTION"),
        ("mine.py:score", None, "is not there"),
        (
            "mine.py:score",
            "def scor(p, r, rows): pass\nscore = 3\nimport os\n",
            "has no function score; it has scor",
        ),
        ("mine.py:score", "x = 1\n", "has no function score; it has none"),
        ("mine.py:score", "def score(:\n", "cannot be run: SyntaxError"),
        ("mine.py:score", "import nowhere\n", "cannot be run: ModuleNotFound"),
        ("mine.py:score", "exit()\n", "cannot be run: SystemExit"),
    ],
)
def test_a_file_without_the_function_is_refused(tmp_path, where, text, said):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match="--reward_file ") as refusal:
        load_score(f"{tmp_path}/{where}")
    assert said in str(refusal.value)


def test_the_function_that_is_named_is_loaded(tmp_path):
    """Classes that look their module up while they are made, too."""
    dataclass = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    (tmp_path / "mine.py").write_text(dataclass + "def score(p, r, rows):\n    return [A(1).x]\n")
    assert load_score(f"{tmp_path}/mine.py:score")([""], [""], [{}]) == [1]


def test_what_a_function_sets_for_the_whole_process_is_put_back(tmp_path, parallel):
    """As code does that loads a model to judge by."""
    (tmp_path / "reward.py").write_text(
        "import os, torch\n"
        "torch.set_grad_enabled(False)\n"
        "def score(prompts, responses, rows):\n"
        "    torch.set_grad_enabled(False)\n"
        "    torch.set_default_dtype(torch.float64)\n"
        "    torch.set_default_device('meta')\n"
        "    torch.set_num_threads(torch.get_num_threads() + 1)\n"
        f"    os.chdir({str(tmp_path)!r})\n"
        "    return [0.0] * len(responses)\n"
    )

    def state():
        process = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
        return *process, torch.zeros(1).device, os.getcwd()

    before, where = state(), f"{tmp_path}/reward.py:score"
    score = load_score(where)
    assert state() == before
    UserScore(where, score)(["a"], ["b"], [{}])
    assert state() == before


def test_a_function_s_file_imports_its_neighbours(tmp_path, monkeypatch):
    """At its head and when it is called, a package too; none hides a module that is installed."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "neighbour_1.py").write_text("def points(text):\n    return len(text)\n")
    (tmp_path / "neighbour_2").mkdir()
    (tmp_path / "neighbour_2" / "__init__.py").write_text("")
    (tmp_path / "neighbour_2" / "part.py").write_text("EXTRA = 3\n")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('not the library')\n")
    (tmp_path / "mine.py").write_text(
        "import colorsys\nfrom neighbour_1 import points\n"
        "def score(prompts, responses, rows):\n"
        "    from neighbour_2.part import EXTRA\n"
        "    return [points(r) + EXTRA for r in responses]\n"
    )
    for _ in range(2):
        assert load_score(f"{tmp_path}/mine.py:score")(["", ""], ["ab", ""], [{}, {}]) == [5, 3]
    assert sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize("task", [None, "GSM8K", "MATH"])
def test_a_task_s_rule_rewards_without_an_evaluation(task):
    given = dict(actor_ckpt_dir="-", actor_save_dir="-", train_file="-", task=task)
    given |= dict(advantage="grpo", samples_per_prompt=2)
    assert find_problems(PPOTrainSettings, given | {"reward": ["rule"]}) == []
    idle = find_problems(PPOTrainSettings, given | {"reward": ["length"]})
    assert any(f"--task {task}: has no effect" in problem for problem in idle) == (task is not None)
