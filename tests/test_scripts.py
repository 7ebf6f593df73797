"""The scripts end to end on a tiny model.

What they write, that a seed fixes it, and how they refuse wrong input.
"""

import contextlib
import io
import json
import runpy
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from src.checkpoint.source import Checkpoint
from src.evaluation.tasks import find_task
from src.parallel.setup import stop
from tests.launch import ROOT, launch

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
RULES = ("official", "strict_match", "flexible_extract", "numeric")


def call(script: str, *arguments) -> SimpleNamespace:
    """A script on one rank, as `python script` would run it, in this process: (code, out, err)."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code, began = [script, *map(str, arguments)], 0, time.monotonic()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
        if dist.is_initialized():
            stop()
    return SimpleNamespace(
        code=code, out=out.getvalue(), err=err.getvalue(), seconds=time.monotonic() - began
    )


def must(script: str, *arguments) -> SimpleNamespace:
    done = call(script, *arguments)
    assert done.code == 0, done.err
    return done


def flags(**values) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def rows_of(path: Path) -> list[dict]:
    text = path.read_text()
    return (
        json.loads(text)
        if path.suffix == ".json"
        else [json.loads(line) for line in text.splitlines()]
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's whole tensors, however it is cut."""
    checkpoint = Checkpoint.open(str(folder))
    return {name: checkpoint.read(name).clone() for name in checkpoint.table}


def same_bits(a: Path, b: Path) -> bool:
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def solver_flags(base: Path, save_dir: Path, **more) -> list[str]:
    """Training at the command line of a user; few rows, three steps an epoch."""
    return flags(
        **dict(
            ckpt_dir=base / "shards",
            save_dir=save_dir,
            train_file=base / "data" / "train.json",
            max_batch_size=8,
            accumulation_steps=3,
            epochs=2,
            lr=1e-2,
            task="GSM8K",
            label_file=base / "data" / "test.json",
            max_new_tokens=12,
            eval_batch_size=3,
        )
        | more
    )


def ppo_flags(base: Path, save_dir: Path, **more) -> list[str]:
    verifier = base / "verifier"
    return flags(
        **dict(
            actor_ckpt_dir=base / "solver",
            actor_save_dir=save_dir / "policy",
            critic_ckpt_dir=verifier,
            critic_save_dir=save_dir / "value",
            reward_model_ckpt_dir=verifier,
            train_file=base / "data" / "train.json",
            max_batch_size=4,
            max_buffer_size=8,
            samples_per_prompt=2,
            iterations=2,
            mini_batches=2,
            ppo_epochs=2,
            max_new_tokens=6,
            lr=1e-3,
            critic_lr=1e-3,
        )
        | more
    )


def grouped_flags(base: Path, save_dir: Path, **more) -> list[str]:
    """GRPO by length, so that the samples of a prompt do differ; no value model, no verifier."""
    return flags(
        **dict(
            actor_ckpt_dir=base / "solver",
            actor_save_dir=save_dir / "policy",
            train_file=base / "data" / "train.json",
            advantage="grpo",
            reward="length",
            max_batch_size=4,
            max_buffer_size=8,
            samples_per_prompt=4,
            iterations=2,
            mini_batches=2,
            ppo_epochs=1,
            max_new_tokens=12,
            lr=1e-3,
        )
        | more
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Everything a user would make, once.

    Data, a model, its shards, and at two ranks all the trainers in a row.
    """
    base = tmp_path_factory.mktemp("scripts")
    must("dataset/build.py", "arithmetic", *flags(save_dir=base / "data", n_train=60, n_test=7))
    must(
        "dataset/start.py",
        *flags(
            train_file=base / "data" / "train.json",
            save_dir=base / "start",
            vocab_size=430,
            dim=32,
            n_layers=1,
            n_heads=4,
        ),
    )
    must("checkpoint_split.py", *flags(ckpt_file=base / "start", save_path=base / "shards", n=2))
    launch(2, "solver_train.py", *solver_flags(base, base / "solver"))
    commands = [
        ["solver_train.py", *solver_flags(base, base / "solver again")],
        [
            "solver_train.py",
            *solver_flags(
                base,
                base / "tuned",
                model_parallel_size=1,
                max_batch_size=4,
                max_tokens_per_batch=150,
                zero=0,
                checkpoint_activations="selective",
                eval_every=4,
                keep_best="accuracy",
                profile=True,
            ),
        ],
        [
            "solver_train.py",
            *solver_flags(
                base,
                base / "context",
                model_parallel_size=1,
                context_parallel_size=2,
                save_every=2,
                keep=9,
            ),
        ],
        [
            "solver_train.py",
            *solver_flags(
                base,
                base / "context, gone on",
                model_parallel_size=1,
                max_batch_size=4,
                zero=3,
                resume=base / "context-state" / "step-00000004",
            ),
        ],
        ["solver_train.py", *solver_flags(base, base / "lora", lora_rank=4, epochs=1)],
        [
            "solver_train.py",
            *solver_flags(
                base,
                base / "qlora",
                lora_rank=4,
                epochs=1,
                quantize="nf4",
                lora_targets="wq,w2",
                lora_dropout=0.1,
            ),
        ],
        [
            "solver_train.py",
            *solver_flags(
                base,
                base / "lora on",
                lora_rank=4,
                epochs=1,
                lr=1e-9,
                ckpt_dir=base / "start",
                adapter_dir=base / "lora" / "adapter",
            ),
        ],
        [
            "solver_generate.py",
            *flags(
                ckpt_dir=base / "solver",
                input_file=base / "data" / "train.json",
                max_rows=8,
                output_file=base / "samples.jsonl",
                num_samples=2,
                temperature=1.0,
                max_new_tokens=8,
            ),
        ],
        [
            "dataset/build.py",
            "pairs",
            *flags(
                train_file=base / "data" / "train.json",
                predictions=base / "samples.jsonl",
                save_file=base / "pairs.json",
            ),
        ],
        [
            "verifier_train.py",
            *flags(
                ckpt_dir=base / "solver",
                save_dir=base / "verifier",
                train_file=base / "pairs.json",
                label_file=base / "data" / "verifier_test.json",
                max_batch_size=4,
                lr=1e-3,
            ),
        ],
        [
            "verifier_evaluate.py",
            *flags(
                ckpt_dir=base / "verifier",
                label_file=base / "data" / "verifier_test.json",
                log_dir=base / "verifier-evaluated",
            ),
        ],
        [
            "verifier_train.py",
            *flags(
                ckpt_dir=base / "solver",
                save_dir=base / "adapted verifier",
                train_file=base / "pairs.json",
                max_batch_size=4,
                lr=1e-2,
                lora_rank=4,
                normalize_scores=True,
            ),
        ],
        [
            "ppo_train.py",
            *ppo_flags(
                base,
                base / "trunk",
                lora_rank=4,
                shared_trunk=True,
                offload=True,
                update="in_turn",
                critic_ckpt_dir=base / "adapted verifier",
                reward_model_ckpt_dir=base / "adapted verifier",
            ),
        ],
        [
            "ppo_train.py",
            *ppo_flags(
                base,
                base / "divided",
                reward="verifier,length,format,overlong,file",
                ref_ema=0.9,
                reward_weights="1,-1,2,1,0.5",
                format_pattern="[0-9]",
                overlong_margin=3,
                reward_file=f"{base / 'my_reward.py'}:score",
                value_norm=True,
                reward_norm=True,
                critic_train="tp1",
                critic_inf="tp1",
                rew_inf="tp1",
            ),
        ],
        [
            "ppo_train.py",
            *grouped_flags(
                base,
                base / "groups",
                filter_rounds=2,
                top_k=20,
                replay_mask=True,
                min_new_tokens=2,
                model_parallel_size=1,
                dump_rollouts=base / "groups" / "rollouts",
                task="GSM8K",
                label_file=base / "data" / "test.json",
                eval_every=1,
                keep_best="accuracy",
                ptx_file=base / "data" / "train.json",
                ptx_coef=0.5,
                ptx_batch_size=4,
            ),
        ],
        [
            "ppo_train.py",
            *ppo_flags(
                base,
                base / "ppo",
                reward="verifier,rule",
                task="GSM8K",
                label_file=base / "data" / "test.json",
            ),
        ],
        [
            "ppo_train.py",
            "--config",
            str(base / "ppo" / "policy-logs" / "settings.yaml"),
            *flags(
                actor_save_dir=base / "ppo again" / "policy",
                critic_save_dir=base / "ppo again" / "value",
            ),
        ],
        [
            "ppo_train.py",
            *ppo_flags(
                base,
                base / "ppo, idle ranks",
                model_parallel_size=1,
                max_buffer_size=2,
                samples_per_prompt=1,
                max_tokens_per_batch=40,
            ),
        ],
        [
            "solver_evaluate.py",
            *flags(
                task="GSM8K",
                ckpt_dir=base / "ppo" / "policy",
                log_dir=base / "evaluated",
                label_file=base / "data" / "test.json",
                max_new_tokens=12,
            ),
        ],
    ]
    (base / "my_reward.py").write_text(
        "def score(prompts, responses, rows):\n"
        "    assert all(prompt == row['instruction'] for prompt, row in zip(prompts, rows))\n"
        "    return [len(response) / 10 for response in responses]\n"
    )
    (base / "commands.json").write_text(json.dumps(commands))
    launch(2, "tests/script_chain.py", base / "commands.json")
    return base


# --- what a run leaves ----------------------------------------------------------------------------


def scalars(folder: Path, name: str, prefix: str) -> list[dict]:
    records = rows_of(folder / f"{name}.jsonl")
    assert (
        records[0]["event"] == "start"
        and records[-1]["event"] == "end"
        and records[-1]["outcome"] == "finished"
    )
    return [
        r for r in records if r["event"] == "scalars" and any(key.startswith(prefix) for key in r)
    ]


def has_events(folder: Path) -> bool:
    return any(file.stat().st_size for file in folder.glob("events.out.tfevents.*"))


def test_ranks_that_divide_the_tokens_train_the_same_and_go_on_as_others(base):
    """Evaluated alike on the way, too: there each answers questions of its own."""
    want = tensors(base / "solver")
    for run in ("context", "context, gone on"):
        got = tensors(base / run)
        assert all(float((got[n] - x).norm() / x.norm()) < 1e-5 for n, x in want.items())
    curves = [
        [s["eval/GSM8K/accuracy"] for s in scalars(base / f"{run}-logs", "solver_train", "eval/")]
        for run in ("solver", "context")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 3


def test_solver_training_logs_every_step_and_evaluates_every_epoch(base):
    logs = base / "solver-logs"
    steps = scalars(logs, "solver_train", "train/")
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6]
    assert {"train/loss", "train/lr", "train/grad_norm", "train/skipped"} <= set(steps[0])
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 0.1
    assert [s["step"] for s in scalars(logs, "solver_train", "eval/")] == [0, 1, 2]
    start = rows_of(logs / "solver_train.jsonl")[0]
    assert start["settings"]["lr"] == 1e-2 and start["settings"]["train_file"] == str(
        base / "data" / "train.json"
    )
    for epoch in (0, 1, 2):
        assert json.loads((logs / f"results-epoch-{epoch}.json").read_text())["n"] == 7
        assert len(rows_of(logs / f"predictions-epoch-{epoch}.jsonl")) == 7
    assert has_events(logs) and "saved to" in (logs / "solver_train.log").read_text()
    assert sorted(f.name for f in (base / "solver").iterdir()) == [
        "consolidated.00.pth",
        "consolidated.01.pth",
        "generation_config.json",
        "manifest.json",
        "params.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_every_step_s_cost_is_logged(base):
    for step in scalars(base / "solver-logs", "solver_train", "train/"):
        phases = [
            step[f"train/seconds/{name}"]
            for name in ("data", "forward", "backward", "communication", "optimizer")
        ]
        assert all(seconds >= 0 for seconds in phases) and min(phases[1:]) > 0
        assert 0.5 * step["train/seconds"] < sum(phases) <= step["train/seconds"] * 1.001
        assert (
            step["train/tokens_per_s"] > 0
            and step["train/memory_gb"] > 0.05
            and 0 < step["train/mfu"] < 1
        )


def test_data_parallel_ranks_packed_by_tokens_take_the_same_steps(base):
    """Also with whole optimizer states, recomputation, evaluations and a profile between."""
    losses = [
        [s["train/loss"] for s in scalars(base / f"{name}-logs", "solver_train", "train/")]
        for name in ("solver", "tuned")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_evaluations_by_step_keep_the_best_and_a_profile_is_left(base):
    logs = base / "tuned-logs"
    found = {s["step"]: s["eval/GSM8K/accuracy"] for s in scalars(logs, "solver_train", "eval/")}
    assert list(found) == [0, 4, 6] and (logs / "results-step-4.json").is_file()
    best = tensors(base / "tuned-best")
    assert best.keys() == tensors(base / "tuned").keys()
    assert same_bits(base / "tuned-best", base / "tuned") == (found[6] > found[4]), (
        "a tie keeps the earlier one"
    )
    assert "the best so far, saved" in (logs / "solver_train.log").read_text()
    for rank in (0, 1):
        trace = json.loads((logs / f"trace-rank-{rank}.json").read_text())
        assert any("mm" in event.get("name", "") for event in trace["traceEvents"])


def test_the_same_seed_twice_gives_the_same_bits(base):
    assert same_bits(base / "solver", base / "solver again")
    assert not same_bits(base / "solver", base / "shards"), "nothing was trained"
    losses = [
        [s["train/loss"] for s in scalars(base / f"{name}-logs", "solver_train", "train/")]
        for name in ("solver", "solver again")
    ]
    assert losses[0] == losses[1]


def test_lora_leaves_an_adapter_and_shards_that_hold_it_already(base, tmp_path):
    """PEFT's merge of the base model and the adapter is the merged checkpoint."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    assert {f.name for f in (base / "lora" / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    must("checkpoint_merge.py", *flags(ckpt_dir=base / "lora", save_dir=tmp_path / "merged"))
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    start = LlamaForCausalLM.from_pretrained(base / "start")
    before = {name: p.clone() for name, p in start.state_dict().items()}
    theirs = (
        PeftModel.from_pretrained(start, base / "lora" / "adapter").merge_and_unload().state_dict()
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    moved = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert moved == {name for name in ours if "_proj" in name}


def test_an_adapter_is_trained_on_from_where_it_was(base):
    """At a learning rate of nothing.

    The same adapter on the base model that was given in another format.
    """
    a, b = tensors(base / "lora on"), tensors(base / "lora")
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    a, b = (
        load_file(base / name / "adapter" / "adapter_model.safetensors")
        for name in ("lora on", "lora")
    )
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_qlora_adapts_its_targets_and_saves_the_base_s_own_weights(base, tmp_path):
    """The frozen weights were quantised in training alone."""
    trained, before = tensors(base / "qlora"), tensors(base / "shards")
    moved = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert moved == {"layers.0.attention.wq.weight", "layers.0.feed_forward.w2.weight"}
    config = json.loads((base / "qlora" / "adapter" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["lora_dropout"], config["r"]) == (
        ["down_proj", "q_proj"],
        0.1,
        4,
    )


def greedy_of(base: Path, out: Path, **more) -> list[dict]:
    must(
        "solver_generate.py",
        *flags(
            **dict(input_file=base / "data" / "test.json", output_file=out, max_new_tokens=4) | more
        ),
    )
    return rows_of(out)


def test_an_adapter_is_added_when_it_is_named(base, tmp_path):
    merged = greedy_of(base, tmp_path / "merged.jsonl", ckpt_dir=base / "lora")
    apart = greedy_of(
        base,
        tmp_path / "apart.jsonl",
        ckpt_dir=base / "start",
        adapter_dir=base / "lora" / "adapter",
    )
    alone = greedy_of(base, tmp_path / "alone.jsonl", ckpt_dir=base / "start")
    assert [r["tokens"] for r in merged] == [r["tokens"] for r in apart]
    for a, b, c in zip(merged, apart, alone):
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4) and a["logprobs"][
            0
        ] != pytest.approx(c["logprobs"][0], abs=1e-3)
    must(
        "checkpoint_merge.py",
        *flags(
            ckpt_dir=base / "start", adapter_dir=base / "lora" / "adapter", save_dir=tmp_path / "hf"
        ),
    )
    a, b = tensors(tmp_path / "hf"), tensors(base / "lora")
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


@pytest.mark.parametrize("kind, near", [("nf4", 0.5), ("int8", 0.05)])
def test_quantised_generation_is_near_the_whole_one(base, tmp_path, kind, near):
    """And keeps a trained adapter beside the quantised weights."""
    given = dict(ckpt_dir=base / "start", adapter_dir=base / "lora" / "adapter")
    whole, quantised = (
        greedy_of(base, tmp_path / f"{q}.jsonl", **given, **more)
        for q, more in (("whole", {}), (kind, {"quantize": kind}))
    )
    first = [
        (a["logprobs"][0], b["logprobs"][0])
        for a, b in zip(whole, quantised)
        if a["tokens"][0] == b["tokens"][0]
    ]
    assert first and all(abs(a - b) < near for a, b in first) and any(a != b for a, b in first)


def test_frozen_layers_stay_as_they_were(base, tmp_path):
    must(
        "solver_train.py",
        *solver_flags(base, tmp_path / "out", epochs=1, freeze_layers=1, task="GSM8K"),
    )
    trained, before = tensors(tmp_path / "out"), tensors(base / "shards")
    assert {name for name in trained if not torch.equal(trained[name], before[name])} == {
        "norm.weight",
        "output.weight",
    }


def test_a_chat_template_writes_the_turns(base, tmp_path):
    """Prompt and response ids are those of the whole conversation.

    Generation stops at the end of the turn.
    """
    shutil.copytree(base / "solver", tmp_path / "solver")
    (tmp_path / "solver" / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} "
        "A:{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "2 + 3", "output": "5"}]))
    for name, more in (("chat", {"use_chat_template": True}), ("plain", {})):
        must(
            "solver_score.py",
            *flags(
                ckpt_dir=tmp_path / "solver",
                input_file=tmp_path / "rows.json",
                output_file=tmp_path / f"{name}.jsonl",
                **more,
            ),
        )
    sp = __import__("sentencepiece").SentencePieceProcessor(
        model_file=str(tmp_path / "solver" / "tokenizer.model")
    )
    chat, plain = rows_of(tmp_path / "chat.jsonl")[0], rows_of(tmp_path / "plain.jsonl")[0]
    assert chat["prompt_tokens"] == [1, *sp.encode("Q: 2 + 3 A:")] and plain["prompt_tokens"] == [
        1,
        *sp.encode("2 + 3"),
    ]
    assert chat["tokens"] == [*sp.encode("5"), 2] == plain["tokens"]
    must("checkpoint_merge.py", *flags(ckpt_dir=tmp_path / "solver", save_dir=tmp_path / "hf"))
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == (
        tmp_path / "solver" / "chat_template.jinja"
    ).read_text()


def test_a_dry_run_needs_no_weights_and_writes_nothing(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = must("checkpoint_split.py", *flags(model_type="llama-2-70b", n=8), "--dry_run").out
    assert (
        "68,976,648,192 parameters" in said
        and "[1024, 8192]" in said
        and "17,246,470,144 bytes" in said
    )
    said = must("checkpoint_split.py", *flags(ckpt_file=base / "solver", n=3), "--dry_run").out
    assert "each of 3 ranks" in said and not list(tmp_path.iterdir())


def test_generation_writes_every_sample_in_order(base):
    rows, train = rows_of(base / "samples.jsonl"), rows_of(base / "data" / "train.json")
    assert [r["index"] for r in rows] == [i for i in range(8) for _ in range(2)]
    assert all(r["instruction"] == train[r["index"]]["instruction"] for r in rows)
    assert all(
        len(r["tokens"]) == len(r["logprobs"]) <= 8 and r["stop_reason"] in ("stop", "length")
        for r in rows
    )
    assert any(a["tokens"] != b["tokens"] for a, b in zip(rows[::2], rows[1::2]))
    assert {"instruction", "chosen", "rejected"} == set(rows_of(base / "pairs.json")[0])


def test_the_verifier_s_training_and_evaluation(base):
    from transformers import LlamaForSequenceClassification

    logs = base / "verifier-logs"
    assert {"train/loss", "train/accuracy"} <= set(scalars(logs, "verifier_train", "train/")[0])
    assert [s["step"] for s in scalars(logs, "verifier_train", "eval/")] == [0, 1] and has_events(
        logs
    )
    results = json.loads((base / "verifier-evaluated" / "results.json").read_text())
    rows = rows_of(base / "verifier-evaluated" / "predictions.jsonl")
    assert results["n"] == results["pairs"] == len(rows) == 7
    assert results["accuracy"] == sum(r["chosen"][0] > r["rejected"][0] for r in rows) / 7
    last = json.loads((logs / "results-epoch-1.json").read_text())
    assert last["accuracy"] == results["accuracy"] and last["margin"] == pytest.approx(
        results["margin"], abs=1e-5
    )

    must(
        "checkpoint_merge.py", *flags(ckpt_dir=base / "verifier", save_dir=base / "verifier merged")
    )
    model = LlamaForSequenceClassification.from_pretrained(base / "verifier merged")
    tokenizer = __import__("sentencepiece").SentencePieceProcessor(
        model_file=str(base / "start" / "tokenizer.model")
    )
    pair = rows_of(base / "data" / "verifier_test.json")[0]
    ids = [1, *tokenizer.encode(pair["instruction"]), *tokenizer.encode(pair["chosen"]), 2]
    with torch.no_grad():
        assert float(model(input_ids=torch.tensor([ids])).logits) == pytest.approx(
            rows[0]["chosen"][0], abs=1e-5
        )


def test_ppo_leaves_policy_value_and_a_log_of_what_matters(base):
    logs, policy = base / "ppo" / "policy-logs", base / "ppo" / "policy"
    steps = scalars(logs, "ppo_train", "ppo/")
    assert [s["step"] for s in steps] == [1, 2] and has_events(logs)
    line_26 = {
        "reward",
        "reward/verifier",
        "reward/rule",
        "kl",
        "kl_max",
        "entropy",
        "response_length",
        "truncated",
        "clipfrac",
        "approxkl",
        "policy_loss",
        "value_loss",
        "explained_variance",
        "policy_grad_norm",
        "value_grad_norm",
        "tokens_per_s/generate",
        "tokens_per_s/update",
        "logprob_drift",
        "kl_coef",
        "lr",
        "critic_lr",
    }
    assert line_26 <= {key.removeprefix("ppo/") for key in steps[0]}
    assert all(s[f"ppo/{name}"] is not None for s in steps for name in line_26)
    assert steps[0]["ppo/kl"] == 0 and steps[1]["ppo/kl"] != 0, (
        "the reference is the policy's start, and stays there"
    )
    assert steps[0]["ppo/policy_steps"] == steps[0]["ppo/value_steps"] == 4
    assert json.loads((policy / "ppo_state.json").read_text()) == {"kl_coef": 0.05}
    # sixty prompts at four an iteration: two iterations end inside the first epoch
    assert [s["step"] for s in scalars(logs, "ppo_train", "eval/")] == [0, 1]
    assert not same_bits(policy, base / "solver") and not same_bits(
        base / "ppo" / "value", base / "verifier"
    )
    assert "score.weight" in tensors(base / "ppo" / "value") and "output.weight" in tensors(policy)


def test_the_settings_of_a_run_fed_back_give_the_same_bits(base):
    """Of PPO on two ranks, with two rewards and evaluations: settings.yaml says all of it."""
    for role in ("policy", "value"):
        assert same_bits(base / "ppo" / role, base / "ppo again" / role)
    first, again = (
        (base / run / "policy-logs" / "settings.yaml").read_text() for run in ("ppo", "ppo again")
    )
    assert again.replace("ppo again", "ppo") == first and "lam: 0.95\n" in first


def test_ppo_on_a_shared_trunk_trains_adapters_that_peft_can_load(base):
    """And stores what the verifier's scores are centred and scaled by, which PPO says it uses."""
    policy, logs = base / "trunk" / "policy", base / "trunk" / "policy-logs"
    steps = scalars(logs, "ppo_train", "ppo/")
    assert steps[0]["ppo/kl"] == 0 and steps[1]["ppo/kl"] != 0
    assert steps[0]["ppo/memory_gb/policy"] > 4 * max(
        steps[0][f"ppo/memory_gb/{r}"] for r in ("reference", "reward")
    )
    assert (policy / "adapter" / "adapter_model.safetensors").is_file() and not same_bits(
        policy, base / "solver"
    )
    moments = json.loads((base / "adapted verifier" / "score_normalization.json").read_text())
    assert (
        f"centred by {moments['mean']:.4f} and divided by {moments['std']:.4f}"
        in (logs / "ppo_train.log").read_text()
    )
    assert not (base / "trunk" / "value" / "score_normalization.json").exists(), (
        "a value model is no verifier"
    )


def test_a_verifier_s_scores_are_centred_and_scaled_on_its_train_file(base, tmp_path):
    pairs = rows_of(base / "pairs.json")
    texts = [
        (row["instruction"], text)
        for row in pairs
        for side in ("chosen", "rejected")
        for text in ([row[side]] if isinstance(row[side], str) else row[side])
    ]
    (tmp_path / "rows.json").write_text(
        json.dumps([{"instruction": i, "output": o} for i, o in texts])
    )
    given = dict(
        ckpt_dir=base / "adapted verifier",
        input_file=tmp_path / "rows.json",
        output_file=tmp_path / "scores.jsonl",
    )
    done = must("verifier_evaluate.py", *flags(**given))
    scores = torch.tensor([row["score"] for row in rows_of(tmp_path / "scores.jsonl")])
    assert abs(float(scores.mean())) < 1e-4 and float(scores.std(correction=0)) == pytest.approx(
        1, abs=1e-4
    )
    assert "scores are centred by" in done.err


def test_ppo_adds_up_its_rewards_and_keeps_what_it_normalises_by(base):
    steps = scalars(base / "divided" / "policy-logs", "ppo_train", "ppo/")
    weights = dict(zip(("verifier", "length", "format", "overlong", "file"), (1, -1, 2, 1, 0.5)))
    for step in steps:
        assert step["ppo/reward"] == pytest.approx(
            sum(w * step[f"ppo/reward/{name}"] for name, w in weights.items()), abs=1e-5
        )
    assert steps[0]["ppo/shaped_reward"] == pytest.approx(0, abs=1e-5), "centred"
    state = json.loads((base / "divided" / "policy" / "ppo_state.json").read_text())
    assert state["reward_norm"] is True and state["reward_moments"][0] == 16
    assert (
        json.loads((base / "divided" / "value" / "ppo_state.json").read_text())["value_moments"][0]
        > 0
    )
    assert len(list((base / "divided" / "value").glob("consolidated.*"))) == 1, (
        "the value model was one rank's"
    )
    assert len(list((base / "divided" / "policy").glob("consolidated.*"))) == 2


def test_grpo_needs_no_value_model_and_dumps_what_it_learned_from(base):
    from pyarrow import parquet

    logs = base / "groups" / "policy-logs"
    steps = scalars(logs, "ppo_train", "ppo/")
    assert (
        not {key for key in steps[0] if "value" in key}
        and steps[0]["ppo/kept"] > 0
        and steps[0]["ppo/ptx_loss"] > 0
    )
    for number, step in enumerate(steps, 1):
        table = parquet.read_table(
            base / "groups" / "rollouts" / f"iteration-{number:06d}.parquet"
        ).to_pylist()
        assert [row["place"] for row in table] == list(range(len(table)))
        assert len(table) in (4, 8) and step["ppo/response_length"] == pytest.approx(
            sum(len(r["tokens"]) for r in table) / len(table)
        )
        for group in (table[i : i + 4] for i in range(0, len(table), 4)):
            assert len({row["prompt"] for row in group}) == 1
            scores = [row["score"] for row in group]
            mean = sum(scores) / 4
            std = (sum((s - mean) ** 2 for s in scores) / 4) ** 0.5
            assert std > 0, "groups whose rewards are all equal are left out"
            for row in group:
                assert row["advantages"] == pytest.approx(
                    [(row["score"] - mean) / (std + 1e-6)] * len(row["tokens"]), abs=1e-4
                )
                assert len(row["tokens"]) >= 2 and row["score_length"] == pytest.approx(
                    len(row["tokens"]) / 12
                )
    texts = [r for r in rows_of(logs / "ppo_train.jsonl") if r["event"] == "text"]
    assert {r["step"] for r in texts} == {1, 2} and all("reward" in r["text"] for r in texts)
    assert [s["step"] for s in scalars(logs, "ppo_train", "eval/")] == [0, 1, 2]
    assert (base / "groups" / "policy-best" / "consolidated.00.pth").is_file()


def test_ppo_s_minibatches_may_leave_a_rank_without_rollouts(base):
    """Two rollouts in two minibatches on two data-parallel ranks."""
    steps = scalars(base / "ppo, idle ranks" / "policy-logs", "ppo_train", "ppo/")
    assert len(steps) == 2 and all(
        step["ppo/policy_grad_norm"] > 0 and step["ppo/policy_skipped"] == 0 for step in steps
    )


def test_evaluation_writes_results_and_predictions(base):
    results = json.loads((base / "evaluated" / "results.json").read_text())
    assert {"task", "accuracy", "n", "unparsed", "truncated", "settings", *RULES} == set(results)
    assert (
        results["task"] == "GSM8K"
        and results["n"] == 7
        and results["accuracy"] == results["official"]
    )
    assert results["settings"]["max_new_tokens"] == 12
    predictions, test = (
        rows_of(base / "evaluated" / "predictions.jsonl"),
        rows_of(base / "data" / "test.json"),
    )
    assert [(p["index"], p["instruction"], p["gold"]) for p in predictions] == [
        (i, row["instruction"], row["label"]) for i, row in enumerate(test)
    ]
    assert all(isinstance(p["output"], str) and set(RULES) <= set(p) for p in predictions)


def test_a_trained_solver_loads_in_transformers_and_says_the_same(base, tmp_path):
    from transformers import LlamaForCausalLM

    must("checkpoint_merge.py", *flags(ckpt_dir=base / "solver", save_dir=tmp_path / "merged"))
    assert same_bits(tmp_path / "merged", base / "solver")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    must(
        "solver_generate.py",
        *flags(
            ckpt_dir=base / "solver",
            input_file=base / "data" / "test.json",
            max_rows=1,
            output_file=tmp_path / "greedy.jsonl",
            max_new_tokens=6,
        ),
    )
    said = rows_of(tmp_path / "greedy.jsonl")[0]
    tokenizer = __import__("sentencepiece").SentencePieceProcessor(
        model_file=str(tmp_path / "merged" / "tokenizer.model")
    )
    ids = torch.tensor([[1, *tokenizer.encode(said["instruction"])]])
    theirs = model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.size(1) :].tolist()
    assert theirs[: len(said["tokens"])] == said["tokens"]


# --- one rank -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["verifier", "rule"])
def test_ppo_with_either_reward_alone_and_a_seed_twice(base, tmp_path, reward, monkeypatch):
    """Also: Adam's eps is the recipe's (docs/ppo.md, line 24)."""
    from src.ppo import setup

    made, real = [], setup.Optimizer

    class Spied(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(setup, "Optimizer", Spied)
    more = {} if reward == "verifier" else {"reward_weights": 3.0}
    for name in ("a", "b"):
        arguments = ppo_flags(
            base, tmp_path / name, reward=reward, iterations=1, kl_coef=0.2, **more
        )
        if reward == "rule":  # needs no verifier
            at = arguments.index("--reward_model_ckpt_dir")
            del arguments[at : at + 2]
        must("ppo_train.py", *arguments)
    assert same_bits(tmp_path / "a" / "policy", tmp_path / "b" / "policy")
    assert same_bits(tmp_path / "a" / "value", tmp_path / "b" / "value")
    assert [o.adam.defaults["eps"] for o in made] == [1e-5] * 4
    step = scalars(tmp_path / "a" / "policy-logs", "ppo_train", "ppo/")[0]
    assert {key for key in step if key.startswith("ppo/reward/")} == {f"ppo/reward/{reward}"}
    assert step["ppo/reward"] == pytest.approx(
        step[f"ppo/reward/{reward}"] * more.get("reward_weights", 1.0)
    )
    assert step["ppo/kl_coef"] == 0.2
    assert json.loads((tmp_path / "a" / "policy" / "ppo_state.json").read_text()) == {
        "kl_coef": 0.2
    }


def test_ppo_goes_on_with_the_coefficient_that_an_earlier_run_left(base, tmp_path):
    shutil.copytree(base / "solver", tmp_path / "actor")
    (tmp_path / "actor" / "ppo_state.json").write_text('{"kl_coef": 0.123}')
    must(
        "ppo_train.py",
        *ppo_flags(
            base,
            tmp_path / "out",
            actor_ckpt_dir=tmp_path / "actor",
            iterations=1,
            kl_target=1.0,
            kl_horizon=10.0,
            truncated="zero",
        ),
    )
    assert scalars(tmp_path / "out" / "policy-logs", "ppo_train", "ppo/")[0]["ppo/kl_coef"] == 0.123
    # KL 0 on the first batch is 100 % below the target: the error is clipped to -0.2, over 8
    # samples of 10
    left = json.loads((tmp_path / "out" / "policy" / "ppo_state.json").read_text())["kl_coef"]
    assert left == pytest.approx(0.123 * (1 - 0.2 * 8 / 10))


def test_rows_that_are_too_long_are_counted_or_refused(base, tmp_path):
    train = rows_of(base / "data" / "train.json")[:6]
    (tmp_path / "train.json").write_text(
        json.dumps([*train, {"instruction": "long " * 200, "output": "1"}])
    )
    given = dict(train_file=tmp_path / "train.json", epochs=1, max_seq_len=300)
    done = must("solver_train.py", *solver_flags(base, tmp_path / "out", **given))
    assert "1 of 7 rows of" in done.err and "left out" in done.err
    done = call(
        "solver_train.py", *solver_flags(base, tmp_path / "strict", **given, strict_length="true")
    )
    assert done.code == 2 and "1 of 7 rows" in done.err and not (tmp_path / "strict").exists()


@pytest.mark.parametrize("source", ["arithmetic", "gsm8k"])
def test_gold_answers_score_full_marks_by_every_rule_without_a_model(base, tmp_path, source):
    if source == "gsm8k" and not (GSM8K / "test.jsonl").is_file():
        pytest.skip("the official GSM8K test.jsonl is not beside the repository")
    labels = base / "data" / "test.json" if source == "arithmetic" else GSM8K / "test.jsonl"
    answers = [row.get("answer") or row["output"] for row in rows_of(labels)]
    (tmp_path / "predictions.jsonl").write_text(
        "".join(json.dumps({"output": text}) + "\n" for text in answers)
    )
    must(
        "solver_evaluate.py",
        *flags(
            task="GSM8K",
            label_file=labels,
            prediction_file=tmp_path / "predictions.jsonl",
            log_dir=tmp_path / "logs",
        ),
    )
    results = json.loads((tmp_path / "logs" / "results.json").read_text())
    assert results["n"] == len(answers) and results["unparsed"] == 0
    assert [results[rule] for rule in (*RULES, "accuracy")] == [1.0] * 5
    assert len(rows_of(tmp_path / "logs" / "predictions.jsonl")) == len(answers)


def test_wrong_and_empty_predictions_count_as_wrong(base, tmp_path):
    labels = rows_of(base / "data" / "test.json")
    texts = [labels[0]["output"], "", "#### 99999", *["no number"] * (len(labels) - 3)]
    (tmp_path / "predictions.jsonl").write_text(
        "".join(json.dumps({"output": text}) + "\n" for text in texts)
    )
    must(
        "solver_evaluate.py",
        *flags(
            task="GSM8K",
            label_file=base / "data" / "test.json",
            prediction_file=tmp_path / "predictions.jsonl",
            log_dir=tmp_path / "logs",
        ),
    )
    results = json.loads((tmp_path / "logs" / "results.json").read_text())
    assert [results[rule] for rule in RULES] == [pytest.approx(1 / 7)] * 4 and results[
        "unparsed"
    ] == 5
    graded = rows_of(tmp_path / "logs" / "predictions.jsonl")
    assert [row["official"] for row in graded] == [
        find_task("GSM8K").grade(t, r["label"])["official"] for t, r in zip(texts, labels)
    ]


def graded_file(base, folder, rows):
    """solver_evaluate.py on given answers to the seven rows of the test file."""
    (folder / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = dict(task="GSM8K", label_file=base / "data" / "test.json", log_dir=folder / "logs")
    return call("solver_evaluate.py", *flags(**given, prediction_file=folder / "given.jsonl"))


def test_given_answers_are_graded_in_the_order_that_they_tell(base, tmp_path):
    rows = [
        {"index": i, "instruction": row["instruction"], "output": row["output"]}
        for i, row in enumerate(rows_of(base / "data" / "test.json"))
    ]
    assert graded_file(base, tmp_path, rows[::-1]).code == 0
    assert json.loads((tmp_path / "logs" / "results.json").read_text())["accuracy"] == 1
    graded = rows_of(tmp_path / "logs" / "predictions.jsonl")
    assert [row["instruction"] for row in graded] == [row["instruction"] for row in rows]


@pytest.mark.parametrize("told", ["index", "instruction"])
def test_answers_to_other_rows_are_refused(base, tmp_path, told):
    rows = rows_of(base / "data" / "test.json")
    answers = [{"index": i + (i > 3), "output": row["output"]} for i, row in enumerate(rows)]
    said = "row 4 (from 0) would be graded as an answer to row 4"
    if told == "instruction":
        answers = [{key: row[key] for key in ("instruction", "output")} for row in rows[::-1]]
        said = "row 0 (from 0) would be graded as an answer to row 0"
    refused(graded_file(base, tmp_path, answers), said)


def test_given_answers_say_row_by_row_whether_they_were_cut(base, tmp_path):
    rows = [{"output": row["output"]} for row in rows_of(base / "data" / "test.json")]
    rows[0] |= {"stop_reason": "length"}
    rows[1] |= {"truncated": True}
    rows[2] |= {"finish_reason": "length"}
    rows[3] |= {"finish_reason": "stop"}
    done = graded_file(base, tmp_path, rows)
    assert f"3 of 7 rows of {tmp_path}/given.jsonl do not say whether they were cut" in done.err
    assert json.loads((tmp_path / "logs" / "results.json").read_text())["truncated"] == 3


def test_training_tells_of_the_rows_that_it_is_measured_on(base, tmp_path):
    rows = rows_of(base / "data" / "test.json")
    rows[0]["instruction"] += " 1" * 1200
    rows[1]["instruction"] += " </s>"
    (tmp_path / "label.json").write_text(json.dumps(rows))
    more = dict(label_file=tmp_path / "label.json", task="GSM8K", epochs=1, max_new_tokens=2)
    done = call("solver_train.py", *solver_flags(base, tmp_path / "out", **more))
    assert done.code == 0, done.err
    assert f"1 of 7 prompts of {tmp_path}/label.json, with one token more," in done.err
    assert "they count as wrong" in done.err
    assert "</s>" in done.err


# --- wrong input ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(base):
    """Files and folders with something wrong in each."""
    folder = base / "wrong"
    folder.mkdir()
    good = {"instruction": "1 + 1?", "output": "#### 2", "label": "2"}
    (folder / "malformed.jsonl").write_text(
        json.dumps(good) + '\n{"instruction": "1 + 1?", "output": 2}\n'
    )
    (folder / "broken.json").write_text(
        '[\n{"instruction": "a", "output": "b"},\n{"instruction": "c" "output"}\n]'
    )
    (folder / "empty.json").write_text("[]")
    (folder / "unlabelled.jsonl").write_text(json.dumps(good) + '\n{"instruction": "2 + 2?"}\n')
    (folder / "one.jsonl").write_text('{"output": "#### 2"}\n')
    shutil.copytree(base / "shards", folder / "hole")
    (folder / "hole" / "consolidated.01.pth").rename(folder / "hole" / "consolidated.02.pth")
    shutil.copytree(base / "shards", folder / "cut short")
    shard = folder / "cut short" / "consolidated.01.pth"
    shard.write_bytes(shard.read_bytes()[:-1000])
    shutil.copytree(base / "shards", folder / "fine")
    shutil.copytree(base / "shards", folder / "NaN")
    shard = torch.load(folder / "NaN" / "consolidated.01.pth")
    shard["norm.weight"][3] = torch.nan
    for rank in (0, 1):
        shard_file = folder / "NaN" / f"consolidated.{rank:02d}.pth"
        torch.save(torch.load(shard_file) | {"norm.weight": shard["norm.weight"]}, shard_file)
    (folder / "NaN" / "manifest.json").unlink()
    shutil.copytree(base / "shards", folder / "flipped")
    shard = folder / "flipped" / "consolidated.01.pth"
    data = shard.read_bytes()
    shard.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("")
    must(
        "dataset/start.py",
        *flags(
            train_file=base / "data" / "train.json",
            save_dir=folder / "other",
            vocab_size=440,
            dim=32,
            n_layers=1,
            n_heads=4,
        ),
    )
    shutil.copytree(base / "verifier", folder / "verifier of another")
    shutil.copyfile(folder / "other" / "tokenizer.model", folder / "larger.model")
    (folder / "verifier of another" / "tokenizer.json").unlink()
    (folder / "verifier of another" / "tokenizer.model").write_bytes(
        _smaller_tokenizer(base, folder)
    )
    return folder


def _smaller_tokenizer(base: Path, folder: Path) -> bytes:
    must(
        "dataset/start.py",
        *flags(
            train_file=base / "data" / "train.json",
            save_dir=folder / "smaller",
            vocab_size=424,
            dim=32,
            n_layers=1,
            n_heads=4,
        ),
    )
    return (folder / "smaller" / "tokenizer.model").read_bytes()


# id: (script, flags changed from the good command line, what the message must say). {} is the
# folder of wrong things.
SOLVER = {
    "missing file": (
        dict(train_file="{}/nope.json"),
        "nope.json: cannot be read: No such file or directory",
    ),
    "another suffix": (dict(train_file="{}/foreign/thesis.tex"), "must end in .json"),
    "malformed row": (dict(train_file="{}/malformed.jsonl"), 'malformed.jsonl:2: field "output"'),
    "not JSON": (dict(train_file="{}/broken.json"), "broken.json:3: not JSON"),
    "empty data set": (dict(train_file="{}/empty.json"), "empty.json: holds no rows"),
    "no checkpoint": (dict(ckpt_dir="{}/nowhere"), "nowhere: no such file or folder"),
    "shards with a hole": (dict(ckpt_dir="{}/hole"), "consolidated.01.pth missing"),
    "shard cut short": (dict(ckpt_dir="{}/cut short"), "consolidated.01.pth: cannot be read"),
    "flipped bit": (
        dict(ckpt_dir="{}/flipped"),
        "consolidated.01.pth: its SHA-256 is not that of what was written",
    ),
    "no such step": (dict(resume="{}/nowhere"), "nowhere: is no saved step"),
    "degree that does not fit the ranks": (
        dict(model_parallel_size=2),
        "--model_parallel_size 2 does not divide the 1 rank",
    ),
    "ranks that divide tokens and are not there": (
        dict(model_parallel_size=2, context_parallel_size=3),
        "--model_parallel_size 2 x --context_parallel_size 3 do not divide the 1 rank",
    ),
    "misspelt flag": (dict(lrr=1e-3), "--lrr: unknown flag; did you mean --lr?"),
    "value of another type": (dict(epochs="two"), "--epochs: must be an integer, got 'two'"),
    "other model_type": (dict(model_type="llama-1-7b"), "dim 32 (a llama-1-7b has 4096)"),
    "unknown model_type": (dict(model_type="llama-9"), "--model_type llama-9: unknown"),
    "tokenizer too large": (
        dict(tokenizer_file="{}/larger.model"),
        "has 440 entries, the model 430",
    ),
    "no tokenizer": (dict(tokenizer_file="{}/none.model"), "none.model: no such file"),
    "task without labels": (
        dict(label_file=None),
        "--task GSM8K --label_file None: evaluation needs both",
    ),
    "labels without task": (dict(task=None), "evaluation needs both"),
    "unknown task": (dict(task="GSM9K"), "unknown task 'GSM9K'; did you mean 'GSM8K'?"),
    "all rows too long": (dict(max_seq_len=3), "60 of 60 rows of"),
    "a folder without a name": (dict(save_dir=""), "--save_dir: is empty"),
    "no learning rate": (dict(lr=0), "--lr 0.0"),
    "best of nothing": (
        dict(keep_best="loss"),
        "--keep_best loss: the evaluation gives accuracy, ",
    ),
    "best without an evaluation": (
        dict(keep_best="accuracy", task=None, label_file=None),
        "evaluation is not asked for",
    ),
    "evaluations of nothing": (
        dict(eval_every=3, task=None, label_file=None),
        "--eval_every 3: has no effect without --label_file",
    ),
    "no ZeRO 4": (dict(zero=4), "--zero: must be one of 0, 1, 2, 3; got '4'"),
    "no room for a token": (
        dict(max_tokens_per_batch=0),
        "--max_tokens_per_batch 0: must be at least 1",
    ),
    "unknown recomputation": (
        dict(checkpoint_activations="true"),
        "--checkpoint_activations: must be one of none, selective, full",
    ),
    "several out of range": (
        dict(lr=0, warmup=1.5, lora_rank=0),
        "--lora_rank 0: must be at least 1",
    ),
    "saving over what is read": (
        dict(ckpt_dir="{}/fine", save_dir="{}/fine"),
        "overlap: saving would remove",
    ),
    "NaN weights": (dict(ckpt_dir="{}/NaN"), "NaN or infinite weights in norm.weight"),
    "dropout without an adapter": (
        dict(lora_dropout=0.1),
        "--lora_dropout: has no effect without --lora_rank",
    ),
    "quantised and trained": (
        dict(quantize="nf4"),
        "quantised weights cannot be trained; give --lora_rank",
    ),
    "unknown target": (
        dict(lora_rank=2, lora_targets="wq,q_proj"),
        "--lora_targets wq,q_proj: choose from wq,wk",
    ),
    "more frozen layers than there are": (dict(freeze_layers=2), "shards has 1 layers"),
    "balance without experts": (
        dict(router_aux_loss_coef=0.1),
        "the model has no experts to balance",
    ),
    "no adapter there": (dict(adapter_dir="{}/fine"), "adapter_config.json: not there"),
    "adapter of another rank": (
        dict(adapter_dir="{}/../lora/adapter", lora_rank=2),
        "has rank 4, alpha 16, on wq,wk,wv,wo,w1,w2,w3",
    ),
    "chat without a template": (dict(use_chat_template=True), "chat_template.jinja"),
    "folder of something else": (dict(save_dir="{}/foreign"), "holds thesis.tex"),
}
PPO = {
    "solver given as reward model": (
        dict(reward_model_ckpt_dir="{}/../solver"),
        "is a solver, without a score head",
    ),
    "another tokenizer": (
        dict(critic_ckpt_dir="{}/verifier of another"),
        "both must share their tokenizer",
    ),
    "rule without labels": (
        dict(reward="rule", reward_model_ckpt_dir=None, train_file="{}/unlabelled.jsonl"),
        "unlabelled.jsonl:2: a row without a gold answer",
    ),
    "verifier without a model": (
        dict(reward_model_ckpt_dir=None),
        "--reward verifier needs --reward_model_ckpt_dir",
    ),
    "a value model's folder without a name": (
        dict(critic_save_dir=""),
        "--critic_save_dir: is empty",
    ),
    "greedy": (dict(temperature=0), "--temperature 0"),
    "buffer no multiple of the samples": (
        dict(samples_per_prompt=3),
        "no multiple of --samples_per_prompt 3",
    ),
    "unknown reward": (
        dict(reward="rules"),
        "--reward rules: choose from verifier, rule, file, format, length, overlong",
    ),
    "too few weights": (
        dict(reward="verifier,length", reward_weights="1"),
        "1 weights for 2 rewards (verifier,length)",
    ),
    "no value model": (dict(critic_ckpt_dir=None), "--advantage gae needs --critic_ckpt_dir"),
    "a value model for nothing": (
        dict(advantage="grpo"),
        "--critic_ckpt_dir: has no effect with --advantage grpo",
    ),
    "groups of one": (
        dict(advantage="rloo", samples_per_prompt=1, critic_ckpt_dir=None, critic_save_dir=None),
        "compares samples of one prompt and needs 2 or more",
    ),
    "idle knobs": (
        dict(advantage="dr_grpo", critic_ckpt_dir=None, critic_save_dir=None, lam=0.9),
        "--lam 0.9: has no effect with",
    ),
    "no such function": (
        dict(reward="file", reward_file="{}/one.jsonl:score", reward_model_ckpt_dir=None),
        "write FILE.py:FUNCTION",
    ),
    "margin too wide": (
        dict(reward="overlong", overlong_margin=7, reward_model_ckpt_dir=None),
        "must lie in [1, --max_new_tokens 6]",
    ),
    "broken pattern": (
        dict(reward="format", format_pattern="(", reward_model_ckpt_dir=None),
        "is no regular expression",
    ),
    "masks of nothing": (dict(replay_mask=True), "--replay_mask: nothing is left out of sampling"),
    "no mix": (dict(ptx_coef=0.1), "the mix needs both"),
    "a trunk without adapters": (
        dict(shared_trunk=True),
        "--shared_trunk: the roles are adapters on one trunk; give --lora_rank",
    ),
    "no adapter to share": (dict(shared_trunk=True, lora_rank=2), "holds no adapter"),
    "an adapter of another trunk": (
        dict(
            shared_trunk=True,
            lora_rank=4,
            actor_ckpt_dir="{}/../shards",
            critic_ckpt_dir="{}/../adapted verifier",
            reward_model_ckpt_dir="{}/../adapted verifier",
        ),
        "was trained on other weights",
    ),
    "a reference for nothing": (dict(kl_coef=0, ref_ema=0.9), "which needs no reference"),
    "divided tokens": (
        dict(context_parallel_size=2),
        "--context_parallel_size 2: is for training on rows; each rank of ppo_train.py learns",
    ),
    "ranks that do not divide": (
        dict(critic_train="tp3"),
        "--critic_train 'tp3': makes up 3 ranks, and it is to take 1 (0-0)",
    ),
    "a layout of nothing": (dict(actor_gen="tq2"), "--actor_gen 'tq2': 'tq2' is no degree"),
    "stages that generate": (dict(actor_gen="pp2"), "makes up 2 ranks"),
    "a flag of old": (
        dict(rollout_model_parallel_size=1),
        "--rollout_model_parallel_size: unknown flag; it is --actor_gen 'tpN' now",
    ),
    "best of nothing": (dict(keep_best="accuracy"), "evaluation is not asked for"),
    "verifier given as solver": (dict(actor_ckpt_dir="{}/../verifier"), "is a verifier"),
    "no room for an answer": (dict(max_seq_len=4), "60 of 60 prompts of"),
}


def changed(arguments: list[str], change: dict, folder: Path) -> list[str]:
    given = dict(zip(arguments[::2], arguments[1::2]))
    for name, value in change.items():
        given[f"--{name}"] = None if value is None else str(value).format(folder)
    return [part for name, value in given.items() if value is not None for part in (name, value)]


def refused(done: SimpleNamespace, message: str) -> None:
    assert done.code == 2 and message in done.err, done.err
    assert (
        done.err.count("error:") == 1
        and done.err.startswith("error: ")
        and "Traceback" not in done.err
    )
    assert done.seconds < 5, "10 s with a process's start"


@pytest.mark.parametrize("case", SOLVER)
def test_solver_training_refuses(base, wrong, tmp_path, case):
    change, message = SOLVER[case]
    done = call("solver_train.py", *changed(solver_flags(base, tmp_path / "out"), change, wrong))
    refused(done, message)
    assert not list(tmp_path.iterdir()), "something was written"
    assert [f.name for f in (wrong / "foreign").iterdir()] == ["thesis.tex"]
    assert same_bits(wrong / "fine", base / "shards")


@pytest.mark.parametrize("case", PPO)
def test_ppo_refuses(base, wrong, tmp_path, case):
    change, message = PPO[case]
    done = call("ppo_train.py", *changed(ppo_flags(base, tmp_path / "out"), change, wrong))
    refused(done, message)
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(
    "script, given, message",
    [
        (
            "verifier_train.py",
            dict(ckpt_dir="{}/../shards", save_dir="{}/out", train_file="{}/malformed.jsonl"),
            'malformed.jsonl:1: field "chosen" is missing',
        ),
        (
            "verifier_evaluate.py",
            dict(ckpt_dir="{}/../solver", label_file="{}/../pairs.json", log_dir="{}/out"),
            "is a solver, without a score head",
        ),
        (
            "verifier_evaluate.py",
            dict(ckpt_dir="{}/../verifier", label_file="{}/../pairs.json"),
            "give --label_file with --log_dir",
        ),
        (
            "solver_generate.py",
            dict(
                ckpt_dir="{}/../solver", input_file="{}/malformed.jsonl", output_file="{}/out.txt"
            ),
            "a .jsonl file is written",
        ),
        (
            "solver_evaluate.py",
            dict(
                task="GSM8K",
                label_file="{}/../data/test.json",
                log_dir="{}/out",
                prediction_file="{}/one.jsonl",
            ),
            "has 1 rows and",
        ),
        (
            "solver_evaluate.py",
            dict(task="GSM8K", label_file="{}/../data/test.json", log_dir="{}/out"),
            "one of the two",
        ),
        (
            "solver_evaluate.py",
            dict(
                task="GSM8K",
                label_file="{}/unlabelled.jsonl",
                log_dir="{}/out",
                prediction_file="{}/one.jsonl",
            ),
            "without a gold answer",
        ),
        (
            "checkpoint_split.py",
            dict(ckpt_file="{}/../start", save_path="{}/out", n=0),
            "--n 0: must be at least 1",
        ),
        ("checkpoint_split.py", dict(n=2), "--ckpt_file and --save_path are needed"),
        (
            "checkpoint_split.py",
            dict(n=2, dry_run=True, model_type="llama-9"),
            "--dry_run without a checkpoint needs --config_file, or",
        ),
        (
            "checkpoint_merge.py",
            dict(ckpt_dir="{}/../start", save_dir="{}/out", adapter_dir="{}/../solver"),
            "adapter_config.json: not there",
        ),
        (
            "checkpoint_merge.py",
            dict(ckpt_dir="{}/hole", save_dir="{}/out"),
            "consolidated.01.pth missing",
        ),
        ("checkpoint_merge.py", dict(ckpt_dir="{}/../shards", save_dir="{}/../shards"), "overlap"),
        (
            "checkpoint_split.py",
            dict(ckpt_file="{}/../start", save_path="{}/../start", n=2),
            "overlap",
        ),
        (
            "solver_generate.py",
            dict(
                ckpt_dir="{}/../solver",
                input_file="{}/malformed.jsonl",
                output_file="{}/malformed.jsonl",
            ),
            "would be overwritten",
        ),
        (
            "dataset/start.py",
            dict(train_file="{}/../data/train.json", save_dir="{}/out", vocab_size=50),
            "--vocab_size 50: no tokenizer of that size",
        ),
        (
            "dataset/build.py arithmetics",
            dict(save_dir="{}/out"),
            "no_robots, math; got arithmetics; did you mean arithmetic?",
        ),
        (
            "dataset/build.py arithmetic",
            dict(save_dir="{}/out", n_train=0),
            "--n_train 0: must be at least 1",
        ),
        ("dataset/build.py gsm8k", dict(source="{}/nowhere", save_dir="{}/out"), "nowhere"),
        (
            "dataset/build.py pairs",
            dict(
                train_file="{}/../data/train.json",
                predictions="{}/malformed.jsonl",
                save_file="{}/out.json",
            ),
            "malformed.jsonl",
        ),
        (
            "solver_score.py",
            dict(
                ckpt_dir="{}/../solver", input_file="{}/malformed.jsonl", output_file="{}/out.jsonl"
            ),
            "malformed.jsonl:2",
        ),
        (
            "solver_score.py",
            dict(ckpt_dir="{}/../verifier", input_file="{}/one.jsonl", output_file="{}/out.jsonl"),
            "is a verifier",
        ),
        (
            "checkpoint_verify.py",
            dict(ckpt_dir="{}/flipped"),
            "consolidated.01.pth: its SHA-256 is not",
        ),
        ("checkpoint_verify.py", dict(ckpt_dir="{}/nowhere"), "nowhere: no such file or folder"),
        (
            "quickstart.py",
            dict(work_dir="{}/out", ranks=3),
            "--ranks 3: the small model has 4 heads",
        ),
    ],
)
def test_the_other_scripts_refuse(wrong, script, given, message):
    script, *subcommand = script.split()
    refused(call(script, *subcommand, *changed([], given, wrong)), message)
    assert not list(wrong.glob("out*")) and not list(wrong.glob(".tmp*")), "something was written"


def test_beams_are_measured_and_sample_nothing(base, tmp_path):
    task = dict(task="GSM8K", label_file=base / "data" / "test.json", log_dir=tmp_path)
    given = flags(**task, ckpt_dir=base / "solver", max_new_tokens=4, num_beams=2)
    refused(
        call("solver_evaluate.py", *given, *flags(num_samples=2)),
        "--num_beams 2: beam search has no --num_samples 2",
    )
    must("solver_evaluate.py", *given)
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["num_beams"] == 2


def test_a_script_s_settings_do_not_replace_another_s(base, tmp_path):
    shutil.copytree(base / "solver-logs", tmp_path / "logs")
    before = (tmp_path / "logs" / "settings.yaml").read_text()
    task = dict(task="GSM8K", label_file=base / "data" / "test.json", log_dir=tmp_path / "logs")
    must("solver_evaluate.py", *flags(**task, ckpt_dir=base / "solver", max_new_tokens=2))
    assert (tmp_path / "logs" / "settings.yaml").read_text() == before
    own = (tmp_path / "logs" / "solver_evaluate.settings.yaml").read_text()
    assert own.startswith("# solver_evaluate.py --config ") and "max_new_tokens: 2\n" in own


def test_a_verifier_s_adapter_makes_a_verifier_of_its_base(base, tmp_path):
    """With its own score head, merged, quantised, or trained on.

    Never a head that is drawn anew.
    """
    must(
        "verifier_train.py",
        *flags(
            ckpt_dir=base / "solver",
            save_dir=tmp_path / "v",
            train_file=base / "pairs.json",
            lora_rank=2,
            max_batch_size=4,
            lr=1e-2,
        ),
    )
    adapter = tmp_path / "v" / "adapter"
    rows = [{"instruction": "2 + 3", "output": text} for text in ("5", "6 apples", "no")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    scores = {}
    for name, given in {
        "merged": dict(ckpt_dir=tmp_path / "v"),
        "added": dict(ckpt_dir=base / "solver", adapter_dir=adapter),
        "int8": dict(ckpt_dir=base / "solver", adapter_dir=adapter, quantize="int8"),
    }.items():
        must(
            "verifier_evaluate.py",
            *flags(
                **given, input_file=tmp_path / "rows.json", output_file=tmp_path / f"{name}.jsonl"
            ),
        )
        scores[name] = [row["score"] for row in rows_of(tmp_path / f"{name}.jsonl")]
    assert scores["added"] == pytest.approx(scores["merged"], abs=1e-5) and scores[
        "int8"
    ] == pytest.approx(scores["merged"], abs=0.1)
    must(
        "verifier_train.py",
        *flags(
            ckpt_dir=base / "solver",
            save_dir=tmp_path / "on",
            train_file=base / "pairs.json",
            lora_rank=2,
            adapter_dir=adapter,
            max_batch_size=4,
            lr=1e-9,
        ),
    )
    a, b = tensors(tmp_path / "on"), tensors(tmp_path / "v")
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    must(
        "checkpoint_merge.py",
        *flags(ckpt_dir=base / "solver", adapter_dir=adapter, save_dir=tmp_path / "hf"),
    )
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lora_dropout=1.0), "lora_dropout is 1.0"),
        (dict(lora_dropout="x"), "lora_dropout is 'x'"),
        (dict(r=10**400), "r is 1000"),
        (dict(lora_alpha=True), "lora_alpha is True"),
        (dict(use_dora=True), "use_dora is set"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(r=3), "expected [3, "),
    ],
)
def test_adapters_that_lie_are_refused(base, tmp_path, change, message):
    shutil.copytree(base / "lora" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(
        call(
            "checkpoint_merge.py",
            *flags(
                ckpt_dir=base / "start", adapter_dir=tmp_path / "adapter", save_dir=tmp_path / "out"
            ),
        ),
        message,
    )
    assert not (tmp_path / "out").exists()


def test_damaged_factors_are_refused(base, tmp_path):
    whole = load_file(base / "lora" / "adapter" / "adapter_model.safetensors")
    key = next(key for key in whole if "q_proj.lora_B" in key)
    for tensor, message in (
        (whole[key] * torch.nan, "NaN or infinity in"),
        (whole[key][:7].contiguous(), "has shape [7, 4]"),
        (whole[key].int(), "no fp32, bf16 or fp16"),
    ):
        folder = tmp_path / "adapter"
        shutil.copytree(base / "lora" / "adapter", folder, dirs_exist_ok=True)
        save_file(whole | {key: tensor}, folder / "adapter_model.safetensors")
        refused(
            call(
                "solver_train.py",
                *solver_flags(base, tmp_path / "out", adapter_dir=folder, lora_rank=4),
            ),
            message,
        )
        assert not (tmp_path / "out").exists()
