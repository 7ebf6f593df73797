"""Preference learning, distillation and best-of-n by their scripts, on a tiny model.

What they write, what a kept reference is known by, that a run goes on exactly, what they refuse.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from tests.launch import launch
from tests.test_scripts import call, flags, must, refused, rows_of, same_bits, tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A solver that answers at random, rows, pairs, labels and rankings of them, and a verifier."""
    base = tmp_path_factory.mktemp("preferences")
    must("dataset/build.py", "arithmetic", *flags(save_dir=base / "data", n_train=40, n_test=5))
    shape = flags(vocab_size=430, dim=32, n_layers=1, n_heads=4)
    train = base / "data" / "train.json"
    must("dataset/start.py", *flags(train_file=train, save_dir=base / "solver"), *shape)
    wide = flags(vocab_size=430, dim=48, n_layers=2, n_heads=4, seed=1)
    must("dataset/start.py", *flags(train_file=train, save_dir=base / "teacher"), *wide)
    rows = rows_of(train)[:24]
    texts = [row["output"] if isinstance(row["output"], str) else row["output"][0] for row in rows]
    asked = [row["instruction"] for row in rows]
    write(base / "pairs.json", [
        {"instruction": q, "chosen": [a], "rejected": [f"{a} no", "never"]}
        for q, a in zip(asked, texts)
    ])  # fmt: skip
    write(base / "labels.json", [
        {"instruction": q, "output": a if i % 3 else f"{a} no", "label": bool(i % 3)}
        for i, (q, a) in enumerate(zip(asked, texts))
    ])  # fmt: skip
    write(base / "ranked.json", [
        {"instruction": q, "ranked": [a, f"{a} no", "never"], "scores": [2, 1, 1]}
        for q, a in zip(asked, texts)
    ])  # fmt: skip
    write(base / "graded.json", [
        {"instruction": q, "output": a, "score": i / 7}
        for i, (q, a) in enumerate(zip(asked, texts))
    ])  # fmt: skip
    write(base / "steps.json", [
        {"instruction": q, "output": "1 + 1\n2 + 2\n4", "labels": [True, i % 2 == 0, False]}
        for i, q in enumerate(asked)
    ])  # fmt: skip
    write(base / "prompts.json", rows)
    made = flags(ckpt_dir=base / "solver", train_file=base / "pairs.json", max_batch_size=24)
    must("verifier_train.py", *made, *flags(save_dir=base / "verifier", lr=1e-3))
    return base


def write(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows))


def learned(base: Path, save_dir: Path, **more) -> list[str]:
    return flags(
        **dict(
            ckpt_dir=base / "solver",
            save_dir=save_dir,
            train_file=base / "pairs.json",
            max_batch_size=8,
            lr=1e-3,
            max_new_tokens=8,
        )
        | more
    )


def online(base: Path, save_dir: Path, **more) -> list[str]:
    given = dict(train_file=base / "prompts.json", online=True, reward="length")
    return learned(base, save_dir, **given | dict(samples_per_prompt=3) | more)


def distilled(base: Path, save_dir: Path, **more) -> list[str]:
    given = dict(train_file=base / "data" / "train.json", teacher_ckpt_dir=base / "teacher")
    return learned(base, save_dir, **given | more)


def steps_of(save_dir: Path, script: str) -> list[dict]:
    lines = rows_of(save_dir.with_name(f"{save_dir.name}-logs") / f"{script}.jsonl")
    return [line for line in lines if line["event"] == "scalars" and "train/loss" in line]


def test_a_run_logs_what_matters_by_side_and_evaluates(base, tmp_path):
    task = dict(task="GSM8K", label_file=base / "data" / "test.json", epochs=2)
    must("preference_train.py", *learned(base, tmp_path / "out", **task))
    steps = steps_of(tmp_path / "out", "preference_train")
    assert len(steps) == 6
    names = {"loss", "accuracy", "margin", "kl", "reward/chosen", "reward/rejected"}
    names |= {
        f"{x}/{side}" for x in ("logprob", "logprob_per_token") for side in ("chosen", "rejected")
    }
    assert {f"train/{name}" for name in names} <= steps[0].keys()
    first, last = steps[0], steps[-1]
    # At first the policy is its reference.
    assert first["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["train/kl"] == pytest.approx(0, abs=1e-5) and first["train/accuracy"] < 0.9
    assert last["train/loss"] < 0.69 and last["train/accuracy"] == 1
    margin = last["train/reward/chosen"] - last["train/reward/rejected"]
    assert last["train/margin"] == pytest.approx(margin, rel=1e-4)
    assert (tmp_path / "out-logs" / "results-epoch-2.json").is_file()


@pytest.mark.parametrize(
    "loss, file",
    [
        ("dpo,sft", "pairs"),
        ("ipo", "ranked"),
        ("kto", "labels"),
        ("kto", "pairs"),
        ("orpo", "pairs"),
        ("simpo", "ranked"),
    ],
)
def test_every_form_of_rows_can_be_learned_from(base, tmp_path, loss, file):
    must(
        "preference_train.py",
        *learned(base, tmp_path / "out", loss=loss, train_file=base / f"{file}.json"),
    )
    steps = steps_of(tmp_path / "out", "preference_train")
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    assert ("train/kl" in steps[0]) == (loss not in ("orpo", "simpo"))
    assert ("train/kl_reference_point" in steps[0]) == (loss == "kto")
    assert ("train/loss/sft" in steps[0]) == ("sft" in loss)
    assert not same_bits(tmp_path / "out", base / "solver")


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 4}, {"lora_rank": 4, "quantize": "nf4"}])
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_kept_reference_gives_the_bits_of_a_live_one(base, tmp_path, lora, loss):
    """Made in this run, read in the next, and at another division into ranks."""
    more = dict(loss=loss, epochs=2, **lora)
    must("preference_train.py", *learned(base, tmp_path / "live", **more))
    cache = dict(cache_reference=tmp_path / "reference.safetensors")
    made = must("preference_train.py", *learned(base, tmp_path / "made", **more, **cache))
    assert f"wrote the reference's log-probabilities to {tmp_path}/reference" in made.err
    read = must("preference_train.py", *learned(base, tmp_path / "read", **more, **cache))
    assert "are those of" in read.err and "wrote the reference's" not in read.err
    losses = [
        [step["train/loss"] for step in steps_of(tmp_path / name, "preference_train")]
        for name in ("live", "made", "read")
    ]
    assert losses[0] == losses[1] == losses[2]
    assert same_bits(tmp_path / "live", tmp_path / "made")
    assert same_bits(tmp_path / "live", tmp_path / "read")


@pytest.mark.parametrize("change", ["model", "tokenizer", "train file", "rows", "dtype"])
def test_a_kept_reference_of_something_else_is_stale_and_says_so(base, tmp_path, change):
    shutil.copytree(base / "solver", tmp_path / "solver")
    shutil.copyfile(base / "pairs.json", tmp_path / "pairs.json")
    paths = dict(ckpt_dir=tmp_path / "solver", train_file=tmp_path / "pairs.json")
    cache = dict(cache_reference=tmp_path / "reference.safetensors", **paths)
    must("preference_train.py", *learned(base, tmp_path / "a", **cache))
    before, more = (tmp_path / "reference.safetensors").read_bytes(), {}
    if change == "model":
        shutil.rmtree(tmp_path / "solver")
        trained = dict(train_file=base / "data" / "train.json", lr=1e-2)
        given = learned(base, tmp_path / "solver", **trained)
        must("solver_train.py", *given[: given.index("--max_new_tokens")])
    elif change == "tokenizer":
        template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        (tmp_path / "solver" / "chat_template.jinja").write_text(template)
        more = dict(use_chat_template=True)
    elif change == "train file":
        write(tmp_path / "pairs.json", rows_of(base / "pairs.json")[::-1])
    elif change == "rows":
        more = dict(max_pairs_per_prompt=1)
    else:
        more = dict(dtype="bf16")
    done = call("preference_train.py", *learned(base, tmp_path / "b", **cache, **more))
    assert done.code == 0, done.err
    assert f"--cache_reference {tmp_path}/reference.safetensors: is stale (another " in done.err
    reasons = done.err.partition("is stale (another ")[2].partition(")")[0]
    assert change in reasons and (change == "tokenizer") == ("tokenizer" in reasons)
    assert (tmp_path / "reference.safetensors").read_bytes() != before


def test_online_pairs_are_the_policy_s_own_and_teach(base, tmp_path):
    """The reward is the share of digits, which grows."""
    (tmp_path / "digits.py").write_text(
        "def score(prompts, responses, rows):\n"
        "    return [sum(c.isdigit() for c in r) / (1 + len(r)) for r in responses]"
    )
    digits = dict(reward="file", reward_file=f"{tmp_path}/digits.py:score", epochs=8, lr=3e-3)
    must("preference_train.py", *online(base, tmp_path / "out", **digits))
    steps = steps_of(tmp_path / "out", "preference_train")
    assert steps[-1]["train/score"] > 1.1 * steps[0]["train/score"]
    assert all(0 < step["train/pairs"] <= 1 for step in steps)
    assert steps[0]["train/generated_tokens"] == 24 * steps[0]["train/response_length"]


def test_online_without_a_difference_changes_nothing(base, tmp_path):
    (tmp_path / "same.py").write_text(
        "def score(prompts, responses, rows):\n    return [1] * len(rows)"
    )
    same = dict(reward="file", reward_file=f"{tmp_path}/same.py:score")
    must("preference_train.py", *online(base, tmp_path / "out", **same))
    steps = steps_of(tmp_path / "out", "preference_train")
    assert [step["train/pairs"] for step in steps] == [0, 0, 0]
    assert same_bits(tmp_path / "out", base / "solver")


@pytest.mark.parametrize("reward", ["verifier", "rule"])
def test_online_by_a_verifier_and_by_a_rule(base, tmp_path, reward):
    of = dict(reward=reward, task="GSM8K") if reward == "rule" else dict(reward=reward)
    of |= dict(reward_model_ckpt_dir=base / "verifier") if reward == "verifier" else {}
    must("preference_train.py", *online(base, tmp_path / "out", **of))
    scores = [step["train/score"] for step in steps_of(tmp_path / "out", "preference_train")]
    assert len(scores) == 3 and (reward == "rule") == (max(scores) == 0)


@pytest.mark.parametrize("script", ["preference_train.py", "distill_train.py"])
def test_a_run_that_was_ended_goes_on_to_the_same_bits(base, tmp_path, script, monkeypatch):
    """Online, or on the student's own answers: what is sampled depends on the step alone."""
    from src.trainer.saving import Saving

    given = online if script == "preference_train.py" else distilled
    more = dict(epochs=2, save_every=2) | ({"on_policy": 0.7} if given is distilled else {})
    must(script, *given(base, tmp_path / "whole", **more))
    after, number = Saving.after, 3

    def ends(self, step: int) -> None:
        after(self, step)
        if step == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(Saving, "after", ends)
    assert call(script, *given(base, tmp_path / "ended", **more)).code == 130
    monkeypatch.setattr(Saving, "after", after)
    done = must(script, *given(base, tmp_path / "ended", **more))
    assert "step-" in done.err or "step 2" in done.err
    assert same_bits(tmp_path / "whole", tmp_path / "ended")


def test_two_ranks_learn_what_one_learns(base, tmp_path):
    """Online, by a verifier, with an adapter; a teacher alone on each rank; best of n."""
    adapted = dict(reward="verifier", reward_model_ckpt_dir=base / "verifier", lora_rank=4)
    jobs = {
        "preference_train.py": lambda out, **more: online(base, out, **adapted, **more),
        "distill_train.py": lambda out, **more: distilled(
            base, out, on_policy=0.5, divergence="js", **more
        ),
    }
    for script, given in jobs.items():
        must(script, *given(tmp_path / f"one-{script}"))
        more = {"teacher_model_parallel_size": 1} if script == "distill_train.py" else {}
        launch(2, script, *given(tmp_path / f"two-{script}", **more))
        a, b = tensors(tmp_path / f"one-{script}"), tensors(tmp_path / f"two-{script}")
        assert max(float((a[n] - b[n]).abs().max()) for n in a) < 2e-5
    kept = dict(best_of="verifier", reward_model_ckpt_dir=base / "verifier", num_samples=3)
    for name in ("one", "two"):
        out = flags(output_file=tmp_path / f"{name}.jsonl", temperature=1.0, max_new_tokens=6)
        words = ["solver_generate.py", *best_of(base), *flags(**kept), *out]
        must(*words) if name == "one" else launch(2, *words)
    one, two = (rows_of(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]


def test_a_cached_teacher_teaches_nearly_as_the_live_one(base, tmp_path):
    """Its file has all of the vocabulary: only what the file's numbers round is lost."""
    rows = rows_of(base / "data" / "train.json")
    texts = [{"instruction": r["instruction"], "output": r["output"]} for r in rows]
    texts = [
        r | {"output": r["output"] if isinstance(r["output"], str) else r["output"][0]}
        for r in texts
    ]
    write(tmp_path / "rows.json", texts)
    scored = tmp_path / "scored.jsonl"
    score = flags(ckpt_dir=base / "teacher", input_file=tmp_path / "rows.json", output_file=scored)
    must("solver_score.py", *score, *flags(top_k_logprobs=500))
    lines = rows_of(scored)
    assert len(lines[0]["top_tokens"]) == len(lines[0]["tokens"]) == len(lines[0]["logprobs"])
    for token, logprob, ids, tops in zip(
        *(lines[0][k] for k in ("tokens", "logprobs", "top_tokens", "top_logprobs"))
    ):
        assert tops == sorted(tops, reverse=True) and len(set(ids)) == len(ids)
        assert tops[ids.index(token)] == pytest.approx(logprob, abs=1e-4)
    live = distilled(base, tmp_path / "live", train_file=tmp_path / "rows.json")
    must("distill_train.py", *live)
    must("distill_train.py", *learned(base, tmp_path / "kept", train_file=scored))
    a, b = (steps_of(tmp_path / name, "distill_train") for name in ("live", "kept"))
    assert [x["train/loss"] for x in a] == pytest.approx([x["train/loss"] for x in b], rel=1e-3)
    assert a[-1]["train/loss"] < a[0]["train/loss"]


def best_of(base: Path, **more) -> list[str]:
    return flags(ckpt_dir=base / "solver", input_file=base / "prompts.json", **more)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(best_of="file"), "--best_of file needs --reward_file"),
        (dict(best_of="verifier"), "without a verifier: --best_of rule"),
        (dict(best_of="rule", temperature=0), "--temperature 0.0: there is nothing to choose from"),
        (
            dict(best_of="rule", num_samples=1),
            "--num_samples 1 --temperature 1.0: there is nothing",
        ),
        (dict(keep="right"), "--keep right: has no effect without --best_of"),
        (dict(best_of="verifier", keep="right"), "--keep right: has no effect with --best_of ver"),
    ],
)
def test_best_of_what_cannot_be_is_refused(base, tmp_path, given, message):
    given = dict(num_samples=4, temperature=1.0, output_file=tmp_path / "x.jsonl") | given
    refused(call("solver_generate.py", *best_of(base, **given)), message)


def test_samples_that_are_there_can_be_judged_by_something_else(base, tmp_path, monkeypatch):
    """A reward that failed is mended: what was generated is not generated again."""
    function = tmp_path / "score.py"
    function.write_text("def score(prompts, responses, rows):\n    return [len(rows)] * len(rows)")
    given = dict(output_file=tmp_path / "x.jsonl", num_samples=3, temperature=1.0)
    given |= dict(max_new_tokens=5, best_of="file", reward_file=f"{function}:score")
    from src.ppo.judge import Judge

    def fails(*_):
        raise UserError("it fails")

    with monkeypatch.context() as broken:
        broken.setattr(Judge, "__call__", fails)
        assert call("solver_generate.py", *best_of(base, **given)).code == 2
    function.write_text("def score(prompts, responses, rows):\n    return [1.0] * len(rows)")
    done = must("solver_generate.py", *best_of(base, **given))
    assert "72 of 72 are there already" in done.err


def test_what_is_judged_ends_before_a_stop_string(base, tmp_path):
    function = tmp_path / "score.py"
    function.write_text(
        "def score(prompts, responses, rows):\n"
        "    assert not any('e' in r for r in responses), responses\n"
        "    return [len(r) for r in responses]"
    )
    given = dict(output_file=tmp_path / "x.jsonl", num_samples=4, temperature=1.0, stop_strings="e")
    given |= dict(max_new_tokens=30, best_of="file", reward_file=f"{function}:score")
    text = function.read_text().replace("assert not any", "assert rows[0] == {} or not any")
    function.write_text(text.replace("rows[0] == {} or ", "'made up' in responses[0] or "))
    must("solver_generate.py", *best_of(base, **given))
    rows = rows_of(tmp_path / "x.jsonl")
    assert rows and all(row["score"] == len(row["output"]) for row in rows)


def test_the_best_samples_are_kept_and_can_be_trained_on(base, tmp_path):
    (tmp_path / "score.py").write_text(
        "def score(prompts, responses, rows):\n"
        "    return [None if len(r) < 3 else len(r) for r in responses]"
    )
    sampling = flags(num_samples=4, temperature=1.0, max_new_tokens=12, seed=3)
    every, kept = tmp_path / "all.jsonl", tmp_path / "kept.jsonl"
    must("solver_generate.py", *best_of(base, output_file=every), *sampling)
    judge = flags(best_of="file", reward_file=f"{tmp_path}/score.py:score")
    done = must("solver_generate.py", *best_of(base, output_file=kept), *sampling, *judge)
    want = {}
    for row in rows_of(every):
        n = len(row["output"])
        if row["stop_reason"] != "length" and n >= 3 and n > want.get(row["index"], (0,))[0]:
            want[row["index"]] = (n, row["output"])
    got = rows_of(kept)
    assert {row["index"]: (row["score"], row["output"]) for row in got} == want and want
    assert f"{len(got)} outputs are kept; {24 - len(got)} instructions have none" in done.err
    trained = flags(ckpt_dir=base / "solver", save_dir=tmp_path / "tuned", train_file=kept)
    must("solver_train.py", *trained)


def test_all_right_samples_are_kept_once_each_by_a_rule(base, tmp_path, monkeypatch):
    """Of a model that writes made-up answers: right, wrong, right again, and cut."""
    from src.generation import journal
    from src.generation.engine import Completion

    answers = ["#### 7", "#### 8", "#### 7", "It is 7: #### 7"]

    def made_up(engine, prompts, sampling, stops, log, what, journal):
        encode = tokenizers[0].response_ids
        texts = [answers[i % 4] for i in range(len(prompts))]
        ids = [encode(text) for text in texts]
        reasons = ["length" if i == 7 else "stop" for i in range(len(prompts))]
        return [Completion(x, [0.0] * len(x), why) for x, why in zip(ids, reasons)]

    from src.generation.responses import GenerationInputs

    tokenizers, read = [], GenerationInputs.read.__func__

    def read_and_keep(cls, settings, parallel):
        inputs = read(cls, settings, parallel)
        tokenizers.append(inputs.model.tokenizer)
        return inputs

    monkeypatch.setattr(journal, "generate_all", made_up)
    monkeypatch.setattr(GenerationInputs, "read", classmethod(read_and_keep))
    rows = [
        {"instruction": q, "label": gold} for q, gold in (("a?", "7"), ("b?", "7"), ("c?", "9"))
    ]
    write(tmp_path / "rows.json", rows)
    out = flags(ckpt_dir=base / "solver", input_file=tmp_path / "rows.json", num_samples=4)
    out += flags(temperature=1.0, best_of="rule")
    must("solver_generate.py", *out, *flags(output_file=tmp_path / "right.jsonl", keep="right"))
    must("solver_generate.py", *out, *flags(output_file=tmp_path / "best.jsonl"))
    kept = [
        [(r["index"], r["output"]) for r in rows_of(tmp_path / f)]
        for f in ("right.jsonl", "best.jsonl")
    ]
    assert sorted(kept[0]) == sorted([(0, answers[0]), (0, answers[3]), (1, answers[0])])
    assert kept[0] == [(0, answers[0]), (0, answers[3]), (1, answers[0])], "in their order"
    assert kept[1] == [(0, answers[0]), (1, answers[0])]


@pytest.mark.parametrize("kind", ["pointwise", "classification", "steps", "ranked"])
def test_a_verifier_learns_from_scores_labels_steps_and_rankings(base, tmp_path, kind):
    files = {"pointwise": "graded", "classification": "labels"}
    file = base / f"{files.get(kind, kind)}.json"
    more = {"objective": "classification", "step_separator": "\\n"} if kind == "steps" else {}
    more = {"objective": kind} if kind in files else more
    given = dict(
        ckpt_dir=base / "solver", save_dir=tmp_path / "out", train_file=file, label_file=file
    )
    best = "correlation" if kind == "pointwise" else "accuracy"
    given |= dict(label_file=file, lr=1e-2, epochs=8, max_batch_size=8, keep_best=best)
    must("verifier_train.py", *flags(**given, **more))
    steps = steps_of(tmp_path / "out", "verifier_train")
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    results = rows_of_results(tmp_path / "out-logs" / "results-epoch-8.json")
    assert results[best] > (0.5 if kind == "pointwise" else 0.6)
    if kind == "steps":
        texts = [{"instruction": r["instruction"], "output": r["output"]} for r in rows_of(file)]
        write(tmp_path / "rows.json", texts)
        out = flags(input_file=tmp_path / "rows.json", output_file=tmp_path / "scores.jsonl")
        scored = ["verifier_evaluate.py", *flags(ckpt_dir=tmp_path / "out"), *out]
        must(*scored, *flags(step_separator="\\n"))
        lines = rows_of(tmp_path / "scores.jsonl")
        assert all(len(x["scores"]) == 3 and x["scores"][-1] == x["score"] for x in lines)
        assert all(x["scores"][0] > x["scores"][2] for x in lines)


def rows_of_results(path: Path) -> dict:
    return json.loads(path.read_text())


def test_dry_runs_tell_of_reference_and_teacher(base, tmp_path):
    out = must("preference_train.py", *learned(base, tmp_path / "a"), "--dry_run").out
    assert "  reference" in out and "chosen" in out and "rejected" in out
    kept = flags(cache_reference=tmp_path / "r.safetensors")
    assert (
        "  reference"
        not in must("preference_train.py", *learned(base, tmp_path / "a"), "--dry_run", *kept).out
    )
    assert (
        "example, prompt 0"
        in must("preference_train.py", *online(base, tmp_path / "a"), "--dry_run").out
    )
    assert (
        "  teacher" in must("distill_train.py", *distilled(base, tmp_path / "a"), "--dry_run").out
    )
    assert not list(tmp_path.iterdir())


# --- wrong input ----------------------------------------------------------------------------------

PAIR = {"instruction": "1 + 1?", "chosen": "2", "rejected": "3"}
# id: (rows of the train file, flags, what the message must say)
PREFERENCE = {
    "equal sides": (
        [PAIR, PAIR | {"rejected": ["4", "2"]}],
        {},
        ".jsonl:2: one text is better",
    ),
    "an empty side": (
        [PAIR, PAIR | {"chosen": " "}],
        {},
        'x.jsonl:2: field "chosen": expected a non-',
    ),
    "no side": (
        [PAIR, {"instruction": "a", "chosen": "b"}],
        {},
        'x.jsonl:2: field "rejected" is missing',
    ),
    "one label": (
        [{"instruction": "a", "output": x, "label": True} for x in "bc"],
        dict(loss="kto"),
        "every row's label is true; good and bad outputs are needed",
    ),
    "labels for pairs": (
        [{"instruction": "a", "output": "b", "label": True}],
        {},
        'x.jsonl:1: field "chosen" is missing',
    ),
    "no such loss": ([PAIR], dict(loss="dpo,ppo"), "--loss dpo,ppo: choose from dpo, ipo"),
    "sft alone": ([PAIR], dict(loss="sft"), "solver_train.py does that"),
    "weights": ([PAIR], dict(loss="dpo,sft", loss_weights=1), "--loss_weights: 1 weights for 2"),
    "idle knob": ([PAIR], dict(gamma_beta_ratio=1), "has no effect without simpo in --loss"),
    "idle cache": (
        [PAIR],
        dict(loss="orpo", cache_reference="{}/r.safetensors"),
        "--cache_reference: has no effect with --loss orpo",
    ),
    "a cache of another kind": (
        [PAIR],
        dict(cache_reference="{}/data.safetensors"),
        "is no file of the reference's log-probabilities",
    ),
    "idle reward": ([PAIR], dict(reward="rule"), "has no effect without --online"),
    "online without a verifier": ([PAIR], dict(online=True), "needs --reward_model_ckpt_dir"),
    "kto online": (
        [PAIR],
        dict(online=True, reward="length", loss="kto"),
        "--loss kto: has no pairs",
    ),
    "a cache among the weights": (
        [PAIR],
        dict(ckpt_dir="{}/fine", cache_reference="{}/fine/r.safetensors"),
        "lies among the weights of --ckpt_dir",
    ),
    "a ranking for kto": (
        [{"instruction": "a", "ranked": ["b", "c", "d"]}],
        dict(loss="dpo,kto"),
        "1 of 1 rows rank more than two outputs",
    ),
    "no weight": ([PAIR], dict(loss="dpo,sft", loss_weights="1,-1"), "must be above 0"),
    "strict online": (
        [PAIR],
        dict(online=True, reward="length", strict_length=True),
        "--strict_length True: has no effect with --online",
    ),
}
DISTILLATION = {
    "another vocabulary": ([], dict(teacher_ckpt_dir="{}/other"), "ids would mean other texts"),
    "a verifier as a teacher": ([], dict(teacher_ckpt_dir="{}/verifier"), "is a verifier"),
    "own answers without a teacher": (
        [],
        dict(teacher_ckpt_dir=None, on_policy=1),
        "--on_policy 1.0: a teacher must",
    ),
    "beta of another": ([], dict(beta=0.3), "--beta 0.3: is js's, and --divergence is forward_kl"),
    "rows that nobody scored": (
        [{"instruction": "a", "output": "b"}],
        dict(teacher_ckpt_dir=None),
        'x.jsonl:1: field "prompt_tokens" is missing',
    ),
    "scored by another vocabulary": (
        [
            {
                "prompt_tokens": [1],
                "tokens": [2],
                "top_tokens": [[2]],
                "top_logprobs": [[-1]],
                "vocabulary": "x",
                "temperature": 1,
            }
        ],
        dict(teacher_ckpt_dir=None),
        ".jsonl:1: was written with another vocabulary",
    ),
}


@pytest.fixture(scope="module")
def wrong(base):
    folder = base / "wrong"
    folder.mkdir()
    shape = flags(vocab_size=440, dim=32, n_layers=1, n_heads=4)
    must(
        "dataset/start.py",
        *flags(train_file=base / "data" / "train.json", save_dir=folder / "other"),
        *shape,
    )
    shutil.copytree(base / "verifier", folder / "verifier")
    shutil.copytree(base / "solver", folder / "fine")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, folder / "data.safetensors")
    return folder


@pytest.mark.parametrize("case", [*PREFERENCE, *DISTILLATION])
def test_what_is_wrong_is_named_before_any_work(base, wrong, tmp_path, case):
    is_preference = case in PREFERENCE
    rows, change, message = PREFERENCE[case] if is_preference else DISTILLATION[case]
    if rows:
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        change = {"train_file": tmp_path / "x.jsonl", **change}
    change = {k: v.format(wrong) if isinstance(v, str) else v for k, v in change.items()}
    given = learned if is_preference else distilled
    words = dict(zip(*[iter(given(base, tmp_path / "out"))] * 2))
    words |= {f"--{name}": value for name, value in change.items()}
    words = [str(x) for pair in words.items() if pair[1] is not None for x in pair]
    refused(call("preference_train.py" if is_preference else "distill_train.py", *words), message)
    assert [path.name for path in tmp_path.iterdir()] == (["x.jsonl"] if rows else [])
