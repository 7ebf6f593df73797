"""The plans that are found, beside all that there are; what they hold, beside the dry run."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from src.checkpoint.source import config_of_type
from src.models.config import ModelConfig
from src.models.exchange import held_in, placement_in
from src.models.layout import tensor_table
from src.models.places import common
from src.models.stages import cut_in_stages
from src.parallel.layout import Layout
from src.planner import search
from src.planner.cost import Cost, received_bytes
from src.planner.hardware import published
from src.planner.job import Job, job_of
from src.planner.report import flags_of, write_flags
from src.planner.search import best_plans, options_of, plan_of, row_plan
from src.settings.config_file import read_config
from src.settings.declaration import build, declared
from src.settings.ppo import PPOTrainSettings
from src.settings.scripts import SolverTrainSettings
from tests.test_scripts import call, flags, must, refused

TINY = ModelConfig(256, 4, 8, 4, 32, 704, 4096)


def job(task: str, config: ModelConfig = TINY, **more) -> Job:
    rest = dict(batch=16, prompt=64, response=64, longest=64, dtype=torch.bfloat16)
    rest |= dict(ppo_epochs=2, mini_batches=2) | more
    return job_of(task, config, config, "gae", True, **rest)


def small(memory: float = 1e9):
    """Nodes of 2 GPUs with little memory."""
    from dataclasses import replace

    return replace(published("h100", 2), memory=memory)


@pytest.mark.parametrize("task", ["sft", "verifier"])
@pytest.mark.parametrize("memory", [1e9, 5e7])
def test_the_best_for_rows_is_the_best_of_all(task, memory):
    hardware, work = small(memory), job(task)
    cost, every = Cost(hardware, 2), []
    for tp, pp, dp in itertools.product((1, 2, 4), repeat=3):
        if tp * pp * dp != 4 or tp > 2:
            continue
        for zero, vp, sp in itertools.product(range(4), (1, 2, 4), (False, True)):
            if (zero and dp == 1) or (sp and tp == 1) or (vp > 1 and (pp == 1 or pp * vp > 4)):
                continue
            if pp > 1 and zero > 1:
                continue
            layout = Layout(dp, pp, tp, sp, 1, zero, vp)
            for rows in (1, 2, 4, 8, 16):
                for recompute in ("none", "selective", "full"):
                    if 16 // dp % rows == 0:
                        every.append(row_plan(work, cost, layout, rows, recompute))
    fitting = [plan.total for plan in every if plan.bytes <= memory]
    assert len(fitting) > 0 and (memory > 1e8 or len(fitting) < len(every))
    assert best_plans(work, hardware, 4, 1)[0].total == pytest.approx(min(fitting), rel=1e-12)


@pytest.mark.parametrize("memory", [1e9, 1.2e8])
def test_the_best_for_ppo_is_the_best_of_all(monkeypatch, memory):
    """Without leaving out what others beat, put together one by one."""
    hardware, work = small(memory), job("ppo")
    found = best_plans(work, hardware, 2, 1)[0]
    monkeypatch.setattr(search, "undominated", lambda options: options)
    monkeypatch.setattr(search, "RECOMPUTE", ("none", "full"))
    cost, best, count = Cost(hardware, 2), np.inf, 0
    for rows, recompute in itertools.product((2, 8), ("none", "full")):
        options = options_of(work, cost, 2, rows, recompute)
        names = [*options]
        few = {name: _spread(options[name]) for name in names}
        for chosen in itertools.product(*(few[name] for name in names)):
            plan, count = plan_of(dict(zip(names, chosen)), rows, recompute), count + 1
            if plan.bytes <= memory:
                best = min(best, plan.total)
    assert count > 1000 and found.bytes <= memory
    assert found.total <= best * (1 + search.COUNTS)


def _spread(options: list, most: int = 16) -> list:
    """Some of them, the quickest and the leanest among them."""
    quickest = min(options, key=lambda option: option.own + option.others)
    leanest = min(options, key=lambda option: sum(option.bytes_on(1)))
    return [quickest, leanest, *options[:: max(1, len(options) // most)]]


def test_a_plan_of_options_is_what_the_search_says():
    """The vectorised sums and `plan_of`'s agree, with roles on halves of their own."""
    hardware, work = small(), job("ppo")
    for plan in best_plans(work, hardware, 4, 20):
        serial = sum(plan.seconds.values())
        saved = sum(min(plan.seconds[a], plan.seconds[b]) for a, b in plan.side_by_side)
        assert plan.total == pytest.approx(serial - saved, rel=1e-9)
        for a, b in plan.side_by_side:
            assert not plan.layouts[a].overlaps(plan.layouts[b])
        assert plan.bytes <= hardware.memory


PAIRS = [
    ("tp4 dp2", "dp8"),
    ("dp8", "tp4"),
    ("pp2 tp2 dp2", "dp8"),
    ("pp2 tp2 dp2", "tp4 dp2"),
    ("pp4 dp2", "tp2 dp4"),
    ("tp2 on 0-3", "tp4 on 4-7"),
    ("tp2 on 0-3", "dp8"),
    ("zero3", "tp2 dp4"),
]


@pytest.mark.parametrize("source, target", PAIRS)
def test_what_a_change_of_layout_brings_is_what_ranks_lack(source, target):
    """Box by box, of the rank that lacks most; the planner goes by whole layers."""
    config = config_of_type("llama-2-7b", None)
    before, after = (Layout.parsed(text, 8, "layout") for text in (source, target))
    placements = [placement_in(before, before.zero >= 2), placement_in(after)]
    stages = [cut_in_stages(config, layout.pp, layout.vp) for layout in (before, after)]
    lacking = dict.fromkeys(after.ranks, 0)
    for name, spec in tensor_table(config).items():
        has, wants = (held_in(p, s, name, False) for p, s in zip(placements, stages))
        for rank in lacking:
            box, new = has.box(spec, rank), wants.box(spec, rank)
            both = common(box, new)
            lacking[rank] += _numel(new) - _numel(both)
    said = received_bytes(config, before, after, 2)
    assert said == pytest.approx(2 * max(lacking.values()), rel=0.05)


def _numel(box) -> int:
    return int(np.prod([max(0, stop - start) for start, stop in box]))


def test_the_flags_are_the_script_s_and_its_dry_run_has_the_plan_s_bytes(tmp_path):
    config = config_of_type("qwen2.5-0.5b", None)
    hardware = published("4090", 8)
    for task, script, kind in (
        ("sft", "solver_train.py", SolverTrainSettings),
        ("ppo", "ppo_train.py", PPOTrainSettings),
    ):
        work = job(task, config, batch=64, prompt=256, response=256, longest=256)
        plan = best_plans(work, hardware, 8, 1)[0]
        path = str(tmp_path / f"{task}.yaml")
        write_flags(path, work, plan, 8)
        values, _, problems = read_config(path, declared(kind))
        assert not problems and values == flags_of(work, plan) == yaml.safe_load(
            Path(path).read_text()
        )
        given = ["--config", path, *flags(model_type="qwen2.5-0.5b", world_size=8), "--dry_run"]
        out = must(script, *given).out
        rows = re.findall(r"^  (\w[\w ,]*?)  +([\d,]+)  +([\d,]+)  +([\d,]+)", out, re.M)
        there = {name: [int(x.replace(",", "")) for x in kinds] for name, *kinds in rows}
        names = {"model": "model", "actor": "policy", "critic": "value"}
        for role in names.keys() & plan.held.keys():
            weights, _, optimizer = there[names[role]]
            assert plan.held[role] == {"weights": weights, "optimizer": optimizer}
        for role in {"reference", "reward"} & plan.held.keys():
            assert plan.held[role]["weights"] == there[role][0]


def test_flags_of_rows_make_up_the_batch():
    work = job("sft", batch=48)
    for plan in best_plans(work, small(), 4, 50):
        made = flags_of(work, plan)
        built = build(SolverTrainSettings, made | dict(ckpt_dir="a", save_dir="b", train_file="c"))
        dp = plan.layouts["model"].dp
        assert built.batches.max_batch_size * built.batches.accumulation_steps * dp == 48


GIVEN = dict(model_type="llama-2-7b", gpus=8, gpu="h100")


@pytest.mark.parametrize(
    "more, without, message",
    [
        (dict(gpu="h900"), (), "--gpu h900: is not in the table (a100-40, a100, h100"),
        ({}, ("gpu",), "give --gpu, a name of the table, or --hardware, a file: one of the two"),
        (dict(hardware="x"), (), "give --gpu, a name of the table, or --hardware"),
        (dict(hardware="nowhere.yaml"), ("gpu",), "--hardware nowhere.yaml: cannot be read: No su"),
        ({}, ("gpus",), "give --gpus, how many there are"),
        ({}, ("model_type",), "give --model_type, or --config_file with a model's sizes"),
        (dict(model_type="llama-9"), (), "--model_type llama-9: is not known (llama-1-7b, "),
        (dict(gpus=1), (), "--gpus 1: nothing fits the 73.6 GB of a rank; the largest model alone"),
        (dict(max_new_tokens=8), (), "--max_new_tokens 8: is less than --response_length 512"),
        (dict(batch=6, samples_per_prompt=4), (), "--batch 6 is no multiple of --samples_per_pro"),
        (dict(batch=2), (), "--batch 2: is less than --mini_batches 4"),
        (dict(calibrate="x.yaml"), (), "--gpu: has no effect with --calibrate, which measures"),
        (
            dict(out="x.yaml", calibrate="y.yaml"),
            ("gpu", "model_type"),
            "--out: has no effect with --calibrate",
        ),
        (dict(check=True), ("gpu",), "--model_type llama-2-7b: has no effect with --check, which"),
        (dict(advantage="grpo"), (), "--advantage grpo --samples_per_prompt 1: compares the sampl"),
        (dict(task="sft", ppo_epochs=1), (), "--ppo_epochs 1: has no effect with --task sft"),
        (dict(gpus=97, task="sft"), (), "--gpus 97 --batch 512: no way to divide the model leaves"),
        (dict(out="README.md/x.yaml"), (), "README.md is not a folder that can be written to"),
        (dict(out="plan.json"), (), "plan.json: a .yaml file is written; name it so"),
    ],
)
def test_what_is_wrong_is_refused(more, without, message):
    given = {name: value for name, value in GIVEN.items() if name not in without}
    refused(call("plan.py", *flags(**(given | more))), message)


def test_plans_are_printed_and_written(tmp_path):
    path = tmp_path / "plan.yaml"
    sizes = dict(GIVEN, gpus=16, batch=64, best=2, critic_model_type="qwen2.5-0.5b", out=path)
    out = must("plan.py", *flags(**sizes)).out
    assert "H100 SXM 80 GB; of each rank:" in out and "in a node (8 ranks each)" in out
    plans = re.findall(r"^\d\. [\d.]+ s an iteration: [\d,]+ tokens/s, MFU 0\.\d+", out, re.M)
    assert len(plans) == 2
    for phase in ("actor_gen", "logprobs", "ref_inf", "rew_inf", "critic_train", "actor_train"):
        assert re.search(rf"^   {phase} +dp\d+ .*on \d", out, re.M)
    written = yaml.safe_load(path.read_text())
    assert all(f"--{name} " in out for name in written) and written["max_buffer_size"] == 64


def test_what_a_plan_leaves_out_its_flags_leave_out(tmp_path):
    """No value model, no reference, no reward model: the script is told so, and has no use for
    them."""
    path = tmp_path / "plan.yaml"
    without = ["--noreference", "--noverifier", *flags(advantage="grpo", samples_per_prompt=8)]
    sizes = flags(model_type="qwen2.5-0.5b", gpus=4, gpu="l40s", batch=64, best=1, out=path)
    must("plan.py", *sizes, *without)
    given = ["--config", str(path), *flags(model_type="qwen2.5-0.5b", world_size=4), "--dry_run"]
    out = must("ppo_train.py", *given).out
    assert re.findall(r"^  (\w+) +[\d,]+ ", out, re.M)[0] == "policy"
    assert "reference" not in out and "  value" not in out and "  reward" not in out
