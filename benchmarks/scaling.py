"""Weak and strong scaling by the planner's cost model: nothing runs but the search.

    python benchmarks/scaling.py --out runs/scaling.md --figure docs/scaling.svg
    python benchmarks/scaling.py --only published

SFT and PPO of 7B and 70B on 8 to 4,096 GPUs: at each number the quickest plan that fits. Strong:
one batch on ever more GPUs; weak: a batch that grows with them. And setups that ReaL (arXiv
2406.14088) has published figures of, beside these. What is assumed of the network is printed; none
of it was measured on so many GPUs.
"""

from pathlib import Path

import torch
from common import report

from src.cli import run
from src.models.hf_config import PRESETS
from src.planner.hardware import published
from src.planner.job import Job, job_of
from src.planner.report import assumptions, rates_of
from src.planner.search import best_plans, useful_flops

GPUS = [8, 32, 128, 512, 1024, 2048, 4096]
STRONG, PER_GPU = 4096, 8  # rows of a step, or rollouts: in all, and for each GPU
MODELS = {"7B": "llama-2-7b", "70B": "llama-2-70b"}
GPU = "h100"
# What the project's own pages say of 4 × 70B on 128 GPUs: 4 iterations of 400 steps, as LLaMA-2 was
# tuned. They do not say the lengths; these are of its example scripts, and of its generation's.
HOURS = {"ReaL": 17.0, "DeepSpeed-Chat": 141.5, "OpenRLHF": 152.8}
STEPS = 4 * 400
LENGTHS = [(128, 512), (1024, 1024)]  # prompt, response


def job_for(task: str, model: str, batch: int, lengths: tuple[int, int] = (512, 512)) -> Job:
    config = PRESETS[model]
    prompt, response = lengths
    rest = dict(batch=batch, prompt=prompt, response=response, longest=response)
    rest |= dict(dtype=torch.bfloat16, ppo_epochs=1, mini_batches=4)
    return job_of(task, config, config, "gae", True, **rest)


def quickest(job: Job, gpus: int):
    """(plan, tokens/s, MFU), or None where nothing fits."""
    hardware = published(GPU, 8)
    plans = best_plans(job, hardware, gpus, 1)
    return (plans[0], *rates_of(job, plans[0], hardware, gpus)) if plans else None


def scaled(
    how: str, tasks: list[str]
) -> dict[tuple[str, str], list[tuple[int, float, float, str]]]:
    """By task and model: (GPUs, tokens/s, MFU, layout) at each number."""
    found: dict[tuple[str, str], list[tuple[int, float, float, str]]] = {}
    for task in tasks:
        for size, model in MODELS.items():
            for gpus in GPUS:
                batch = STRONG if how == "strong" else PER_GPU * gpus
                result = quickest(job_for(task, model, batch), gpus)
                if result is not None:
                    plan, tokens, mfu = result
                    layout = plan.layouts["model" if task == "sft" else "actor_train"]
                    said = str(layout).partition(" on ")[0]
                    found.setdefault((task, size), []).append((gpus, tokens, mfu, said))
    return found


def table(how: str, figure: dict, tasks: list[str]) -> list[str]:
    batch = f"{STRONG:,}" if how == "strong" else f"{PER_GPU} for each GPU"
    lines = [
        f"{how.capitalize()} scaling, {batch} rows of 512 + 512 tokens. Efficiency: tokens/s of a "
        "GPU beside those at the fewest GPUs that it fits on.",
        "",
        "| task | model | GPUs | tokens/s | efficiency | MFU | trained in |",
        "|---" * 7 + "|",
    ]
    figure[how] = scaled(how, tasks)
    for (task, size), rows in figure[how].items():
        first = rows[0][1] / rows[0][0]
        for gpus, tokens, mfu, layout in rows:
            share = tokens / gpus / first
            cells = f"{gpus:,} | {tokens:,.0f} | {share:.2f} | {mfu:.3f} | {layout}"
            lines.append(f"| {task} | {size} | {cells} |")
    return lines


def published_table() -> list[str]:
    lines = [
        "Setups of ReaL's, 512 rollouts an iteration, one epoch in 4 minibatches (not stated; as "
        "LLaMA-2's), by the cost model, beside what its pages say:",
        "",
        "| models | GPUs | prompt + response | seconds of an iteration | MFU | 1,600 iterations | "
        + " | ".join(f"{name}, published" for name in HOURS)
        + " |",
        "|---" * (6 + len(HOURS)) + "|",
    ]
    for size, gpus in (("7B", 8), ("70B", 128)):
        for lengths in LENGTHS:
            job = job_for("ppo", MODELS[size], 512, lengths)
            result = quickest(job, gpus)
            if result is None:
                continue
            plan, _, mfu = result
            hours = plan.total * STEPS / 3600
            said = [f"{h:g} h" if size == "70B" else "" for h in HOURS.values()]
            cells = f"{lengths[0]} + {lengths[1]} | {plan.total:.1f} | {mfu:.3f} | {hours:.1f} h"
            lines.append(f"| 4 × {size} | {gpus} | {cells} | " + " | ".join(said) + " |")
    reached = HOURS["ReaL"] * 3600 / STEPS
    for lengths in LENGTHS:
        flops = useful_flops(job_for("ppo", MODELS["70B"], 512, lengths))
        mfu = flops / reached / 128 / published(GPU, 8).peak
        lines += ["", f"{HOURS['ReaL']} h are {reached:.1f} s an iteration: with {lengths[0]} + "]
        lines[-1] += f"{lengths[1]} tokens that is an MFU of {mfu:.3f}."
    return lines


def draw(figure: dict, path: str) -> None:
    """Tokens/s by GPUs; dashed what as many times the fewest would be."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(1, len(figure), figsize=(5 * len(figure), 4), squeeze=False)
    for axis, (how, lines) in zip(axes[0], figure.items()):
        for (task, size), rows in lines.items():
            gpus, tokens = [row[0] for row in rows], [row[1] for row in rows]
            (line,) = axis.loglog(gpus, tokens, marker="o", markersize=3, label=f"{task} {size}")
            ideal = [tokens[0] * n / gpus[0] for n in gpus]
            axis.loglog(gpus, ideal, linestyle="--", linewidth=0.7, color=line.get_color())
        axis.set_title(f"{how} scaling")
        axis.set_xlabel("GPUs")
        axis.set_ylabel("tokens/s")
        axis.legend()
    fig.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)


def main(
    only: str | None = None,
    out: str | None = None,
    figure: str | None = None,
    task: str | None = None,
) -> None:
    """only: "strong", "weak" or "published"; figure: .svg to write of the first two; task: one."""
    drawn: dict = {}
    tasks = [task] if task else ["sft", "ppo"]
    tables = {
        "assumptions": lambda: assumptions(published(GPU, 8)),
        "strong": lambda: table("strong", drawn, tasks),
        "weak": lambda: table("weak", drawn, tasks),
        "published": published_table,
    }
    report(tables, only, out)
    if figure is not None and drawn:
        draw(drawn, figure)


if __name__ == "__main__":
    run(main)
