"""Plans in words: what is printed of them, and the flags that a script takes."""

import math
from collections.abc import Sequence
from pathlib import Path

import yaml

from src.parallel.layout import Layout
from src.parallel.setup import DTYPES
from src.planner.hardware import GB, Hardware
from src.planner.job import PPO, Job
from src.planner.search import Plan, useful_flops

SCRIPTS = {"sft": "solver_train.py", "verifier": "verifier_train.py", "ppo": "ppo_train.py"}
WITHOUT_LAYOUT = {
    "passes": "model",
    "update": "model",
    "logprobs": "actor_train",
    "relayout": "actor_gen",
    "value_relayout": "critic_inf",
}


def rates_of(job: Job, plan: Plan, hardware: Hardware, gpus: int) -> tuple[float, float]:
    """(tokens/s over all ranks, share of the peak operations that the mathematics needs)."""
    mfu = useful_flops(job) / plan.total / gpus / hardware.peak
    return job.tokens / plan.total, mfu


def lines_of(job: Job, plan: Plan, hardware: Hardware, gpus: int, number: int) -> list[str]:
    """A plan: its layouts and seconds by phase, its bytes by role and kind, its flags."""
    tokens, mfu = rates_of(job, plan, hardware, gpus)
    unit = "an iteration" if job.task == PPO else "a step"
    rows = [("phase", "layout", "seconds", "GB beside what is held")]
    for phase, seconds in plan.seconds.items():
        layout = plan.layouts[WITHOUT_LAYOUT.get(phase, phase)]
        beside = plan.beside.get(phase)
        kinds = {} if beside is None else {k: v for k, v in vars(beside).items() if v >= 5e6}
        of_kinds = ", ".join(f"{kind} {size / GB:.2f}" for kind, size in kinds.items())
        rows.append((phase, str(layout), f"{seconds:.3f}", of_kinds))
    kinds_held = "weights", "optimizer"
    held: list[tuple[str, ...]] = [("held", *kinds_held)]
    for role, sizes in plan.held.items():
        held.append((role, *(f"{sizes.get(kind, 0) / GB:.2f} GB" for kind in kinds_held)))
    beside_each_other = "".join(f"; {a} and {b} at the same time" for a, b in plan.side_by_side)
    return [
        f"{number}. {plan.total:.3f} s {unit}: {tokens:,.0f} tokens/s, MFU {mfu:.3f}; "
        f"{plan.bytes / GB:.1f} of {hardware.memory / GB:.1f} GB{beside_each_other}",
        *table(rows),
        *table(held),
        f"   {SCRIPTS[job.task]} " + " ".join(_flag(k, v) for k, v in flags_of(job, plan).items()),
        "",
    ]


def flags_of(job: Job, plan: Plan) -> dict[str, object]:
    """What the job's script is to be given."""
    flags: dict[str, object] = {"dtype": next(n for n, d in DTYPES.items() if d == job.dtype)}
    if job.task == PPO:
        layouts = dict(plan.layouts)
        if "critic_inf" in layouts and layouts["critic_inf"].is_like(layouts["critic_train"]):
            del layouts["critic_inf"]  # the value model itself
        flags |= {name: str(layout) for name, layout in layouts.items()}
        flags |= {
            "max_buffer_size": job.batch,
            "samples_per_prompt": job.samples_per_prompt,
            "ppo_epochs": job.ppo_epochs,
            "mini_batches": job.mini_batches,
            "max_new_tokens": job.longest,
            "rollout_batch_size": plan.slots,
            "advantage": job.advantage,
            # Room for what is planned to run at a time; by itself the engine takes what is free.
            "kv_cache_gb": math.ceil(plan.beside["actor_gen"].cache / GB * 100 + 1) / 100,
        }
        if "reference" not in job.models:
            flags["kl_coef"] = 0.0
        if "reward" not in job.models:
            flags["reward"] = "rule"
    else:
        flags |= _degrees(plan.layouts["model"])
        per_model = job.batch // plan.layouts["model"].dp
        flags["accumulation_steps"] = per_model // plan.rows
    flags["max_batch_size"] = plan.rows
    flags["max_seq_len"] = job.prompt + job.longest
    # Otherwise a GPU takes as many tokens at a time as it has room for.
    flags["max_tokens_per_batch"] = plan.rows * (job.tokens // job.batch)
    flags["checkpoint_activations"] = plan.recompute
    return flags


def _degrees(layout: Layout) -> dict[str, object]:
    """A layout by the flags of the scripts that have one."""
    degrees: dict[str, object] = {"model_parallel_size": layout.tp}
    if layout.pp > 1:
        degrees["pipeline_parallel_size"] = layout.pp
        if layout.vp > 1:
            degrees["stages_per_rank"] = layout.vp
    if layout.cp > 1:
        degrees["context_parallel_size"] = layout.cp
    if layout.models > 1:
        degrees["zero"] = layout.zero
    if layout.sp:
        degrees["sequence_parallel"] = True
    return degrees


def write_flags(path: str, job: Job, plan: Plan, gpus: int) -> None:
    """The flags as a file for --config."""
    head = f"# {SCRIPTS[job.task]} on {gpus} ranks, as plan.py found: {plan.total:.3f} s\n"
    text = yaml.safe_dump(flags_of(job, plan), sort_keys=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(head + text, encoding="utf-8")


def assumptions(hardware: Hardware) -> list[str]:
    """What the seconds are made of."""
    lines = []
    for name, rates in (
        ("scored", hardware.score),
        ("trained", hardware.train),
        ("generated", hardware.decode),
    ):
        lines.append(
            f"  {name}: products {rates.products / 1e12:.3g} TFLOP/s, attention "
            f"{rates.attention / 1e12:.3g}; memory {rates.elements / GB:.3g} GB/s, weights "
            f"{rates.weights / GB:.3g}; a layer {rates.layer * 1e6:.3g} µs"
        )
    for name, links in (("in a node", hardware.node), ("between nodes", hardware.network)):
        parts = [
            f"{kind} {link.bandwidth / GB:.3g} GB/s after {link.latency * 1e6:.3g} µs"
            for kind, link in vars(links).items()
        ]
        lines.append(f"  {name} ({hardware.per_node} ranks each): {', '.join(parts)}")
    return [f"{hardware.name}; of each rank:", *lines]


def _flag(name: str, value: object) -> str:
    if value is True:
        return f"--{name}"
    text = f"'{value}'" if " " in str(value) else str(value)
    return f"--{name} {text}"


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of columns, indented."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "   " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in rows
    ]
