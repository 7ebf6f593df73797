"""The dry run tells the bytes that are really held, the rows and steps, and writes nothing."""

import json
import re

import pytest
import torch

from src.checkpoint.load import load_model
from src.checkpoint.source import Checkpoint, config_of_type
from src.models.config import ModelConfig
from src.models.lora import LoRAConfig, freeze_layers, wrap_lora
from src.models.quantize import stored_bytes
from src.models.stages import cut_in_stages
from src.models.transformer import build
from src.settings.scripts import SolverTrainSettings
from src.trainer.budget import model_budget, training_budget
from src.trainer.optimizer import Optimizer
from tests.test_recipes import tiny  # noqa: F401 (a fixture)
from tests.test_scripts import call, flags, must, refused
from tests.trainer.tiny import save_llama

LORA = LoRAConfig(rank=3, targets=("wq", "w2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    for head in ("lm", "score"):
        save_llama(folder / head, head, seed=1)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize(
    "lora, quantize, frozen",
    [(None, None, 0), (None, None, 1), (LORA, None, 0), (LORA, "nf4", 0), (LORA, "int8", 1)],
)
def test_the_bytes_are_those_of_a_step(folder, parallel, dtype, head, lora, quantize, frozen):
    checkpoint = Checkpoint.open(str(folder / head))
    model = load_model(checkpoint, parallel, dtype, head, quantize=quantize, lora=lora)
    freeze_layers(model, frozen)
    optimizer = Optimizer(model, parallel)
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
    gradients = sum(p.grad.nbytes for p in optimizer.parameters)
    optimizer.step(1e-3)
    budget = training_budget(checkpoint.config, 1, 1, dtype, lora, quantize, frozen)
    assert budget.weights == sum(stored_bytes(p.data) for p in model.parameters())
    assert budget.gradients == gradients
    assert budget.optimizer == sum(x.nbytes for x in optimizer.state_tensors())
    assert budget.total == budget.weights + budget.gradients + budget.optimizer


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("ranks, per_rank", [(2, 1), (3, 1), (2, 2)])
def test_the_bytes_of_a_pipeline_are_those_of_its_fullest_rank(parallel, lora, ranks, per_rank):
    config = ModelConfig(64, 5, 4, 2, 16, 96, 500)
    stages, kept = cut_in_stages(config, ranks, per_rank), []
    for rank in range(ranks):
        model = build(config, 0, 1, torch.bfloat16, None, stages, rank)
        if lora is not None:
            wrap_lora(model, lora, parallel)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        kept.append((sum(p.nbytes for p in model.parameters()), 4 * trained))
    budget = training_budget(config, 1, 1, torch.bfloat16, lora, stages=stages)
    assert (budget.weights, budget.gradients) in kept
    assert all(weights + 4 * gradients <= budget.total for weights, gradients in kept)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_a_frozen_model_has_its_weights_alone(folder, parallel, quantize):
    checkpoint = Checkpoint.open(str(folder / "lm"))
    model = load_model(checkpoint, parallel, torch.bfloat16, quantize=quantize)
    budget = model_budget(checkpoint.config, 1, torch.bfloat16, quantize)
    assert budget.total == sum(stored_bytes(p.data) for p in model.parameters())


def test_rows_steps_and_an_example_are_shown_and_nothing_is_written(tiny, tmp_path):  # noqa: F811
    rows = tiny / "data" / "train.json"
    given = flags(ckpt_dir=tiny / "start", save_dir=tmp_path / "out", train_file=rows)
    out = must("solver_train.py", *given, *flags(max_batch_size=8, epochs=3), "--dry_run").out
    first = json.loads(rows.read_text())[0]
    assert "rows: 60 of train.json\n" in out and "steps: 3 x 8 = 24, of 8 rows\n" in out
    kinds = ("  no loss  ", "  loss     ")
    lines = {line[:11].strip(): line[11:] for line in out.splitlines() if line.startswith(kinds)}
    assert lines["no loss"] == repr(f"<s>{first['instruction']}")
    assert lines["loss"] == repr(f"{first['output']}</s>")
    assert not list(tmp_path.iterdir())
    # Two of three rows too long: counted, and fewer steps.
    short = must("solver_train.py", *given, *flags(max_seq_len=130), "--dry_run").out
    assert "rows of" in short and "are left out" in short and "steps: 1 x 10" not in short


def test_a_pair_and_a_prompt_are_shown(tiny):  # noqa: F811
    pairs = tiny / "data" / "verifier_train.json"
    out = must(
        "verifier_train.py", *flags(ckpt_dir=tiny / "start", train_file=pairs), "--dry_run"
    ).out
    row = json.loads(pairs.read_text())[0]
    for side in ("chosen", "rejected"):
        assert repr(f"<s>{row['instruction']} {row[side]}</s>") in out, "the space is the ids'"
    rows = tiny / "data" / "train.json"
    given = flags(actor_ckpt_dir=tiny / "start", train_file=rows, advantage="rloo", reward="rule")
    more = flags(samples_per_prompt=4, max_buffer_size=16, max_seq_len=256)
    out = must("ppo_train.py", *given, *more, "--dry_run").out
    row = json.loads(rows.read_text())[0]
    assert "prompts: 60\n" in out and "iterations: 15 of 16 rollouts" in out
    assert f"  gold     {row['label']!r}" in out and repr(f"<s>{row['instruction']}") in out


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(), "needs --config_file, or a --model_type of llama-1-7b"),
        (dict(model_type="llama-9"), "needs --config_file, or a --model_type"),
        (
            dict(model_type="llama-2-7b", world_size=6, model_parallel_size=4),
            "does not divide the 6",
        ),
        (
            dict(model_type="llama-2-7b", world_size=8, context_parallel_size=3),
            "--model_parallel_size 2 x --context_parallel_size 3 does not divide the 8",
        ),
        (
            dict(model_type="llama-2-7b", world_size=12, context_parallel_size=3),
            "--context_parallel_size 3: does not divide the 8 query heads that a rank has of the",
        ),
        (dict(ckpt_dir="nowhere", train_file="nowhere.json"), "nowhere: no such file or folder"),
        (dict(model_type="llama-2-7b", freeze_layers=33), "the model has 32 layers"),
        (dict(model_type="llama-2-7b", save_dir=""), "--save_dir: is empty"),
        (dict(model_type="llama-2-7b", lora_rank=0), "--lora_rank 0: must be at least 1"),
    ],
)
def test_what_is_wrong_is_refused_as_in_a_run(more, message):
    refused(call("solver_train.py", *flags(**more), "--dry_run"), message)


def test_ranks_that_divide_tokens_share_the_optimizer_s_state_as_others_do():
    """And are told apart from those that have rows of their own."""
    size = dict(model_type="llama-2-7b", dtype="bf16", world_size=8, model_parallel_size=2)
    plain, context = (
        must("solver_train.py", *flags(**size, **more), "--dry_run").out.splitlines()
        for more in ({}, dict(context_parallel_size=2))
    )
    assert "ranks: 2 model-parallel × 4 data-parallel" in plain
    assert "ranks: 2 model-parallel × 2 context-parallel × 2 data-parallel" in context
    assert [line for line in plain if "model-" not in line] == [
        line for line in context if "model-" not in line
    ]


PPO = dict(model_type="qwen2.5-0.5b", dtype="bf16", world_size=8)


@pytest.mark.parametrize("flag", ["actor_train", "actor_gen", "critic_inf", "rew_inf"])
def test_layouts_of_roles_are_checked_for_the_planned_ranks(flag):
    size = flags(**PPO, reward_model_ckpt_dir="R", **{flag: "tp3"})
    refused(
        call("ppo_train.py", *size, "--dry_run"),
        f"--{flag} 'tp3': makes up 3 ranks, and it is to take 8 (0-7)",
    )


def test_each_role_s_bytes_are_those_of_its_layout():
    """Of the fullest rank of each: half the ranks hold a reference, half a reward model."""
    layouts = dict(actor_train="dp2 tp4", actor_gen="dp8", critic_train="pp2 tp4")
    layouts |= dict(critic_inf="tp8", ref_inf="tp2 on 0-3", rew_inf="tp4 on 4-7")
    out = must("ppo_train.py", *flags(**PPO, **layouts), "--dry_run").out
    held = {
        name.strip(): int(n.replace(",", ""))
        for name, n in re.findall(r"^  (\w[\w ,]*?)  +([\d,]+) ", out, re.M)
    }
    config = config_of_type("qwen2.5-0.5b", None)
    value = config.with_head("score")
    assert held == {
        "policy": weights_of(config, 4),
        "policy again, in rollouts": weights_of(config, 1),
        "reference": weights_of(config, 2),
        "value": max(weights_of(value, 4, stage) for stage in range(2)),
        "value again, for values": weights_of(value, 8),
        "reward": weights_of(value, 4),
    }
    assert "critic_train dp1 pp2 tp4 on 0-7" in out and "ref_inf dp2 tp2 on 0-3" in out


def weights_of(config: ModelConfig, n: int, stage: int | None = None) -> int:
    """Bytes in bf16 of what is really built, of all layers or of one stage of two."""
    stages = None if stage is None else cut_in_stages(config, 2)
    model = build(config, 0, n, torch.bfloat16, None, stages, stage or 0)
    return sum(weight.numel() * 2 for weight in model.parameters())


def test_what_ppo_holds_beside_its_roles_is_counted():
    """An exact reference that moves, a policy laid out anew for rollouts, adapters on a trunk."""

    def rows(**more) -> dict[str, list[int]]:
        out = must("ppo_train.py", *flags(**PPO, **more), "--dry_run").out
        lines = [line.rsplit(maxsplit=4) for line in out.splitlines() if line.startswith("  ")]
        return {
            cells[0].strip(): [int(x.replace(",", "")) for x in cells[1:]]
            for cells in lines
            if len(cells) == 5 and cells[-1].replace(",", "").isdigit() and "all" not in cells[0]
        }

    plain = rows()
    weights = plain["policy"][0]
    assert plain["reference"] == [weights, 0, 0, weights]
    assert rows(ref_ema=0.9)["reference"][0] == 3 * weights  # bf16, and fp32 beside it
    copy = rows(actor_gen="dp8")["policy again, in rollouts"][0]
    assert copy == 2 * 494_032_768
    trunk = rows(lora_rank=8, shared_trunk=True)
    head = 896 * 2
    assert trunk["reference"][0] == 0
    assert trunk["reward"][0] == trunk["value"][0] > head
    assert trunk["policy"][0] == weights + trunk["reward"][0] - head


def test_ranks_are_planned_for_in_a_dry_run_alone(tiny, tmp_path):  # noqa: F811
    rows = flags(train_file=tiny / "data" / "train.json", ckpt_dir=tiny / "start")
    done = call("solver_train.py", *rows, *flags(save_dir=tmp_path / "out", world_size=8))
    refused(done, "--world_size 8: has no effect without --dry_run")
    assert SolverTrainSettings.may_lack_required({"dry_run": True})
