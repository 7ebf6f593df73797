"""What `make smollm` came to over seeds: the table, and the curves of its GRPO.

    python benchmarks/smollm_table.py --runs runs/smollm-0,runs/smollm-1 --plot docs/smollm.svg

Each run's folder has a summary.json when it has finished.
"""

import json
from pathlib import Path

from common import ROOT, draw_band

from src.cli import run

CURVES = {"first": "problems of one step", "grpo": "of one or two"}


def main(
    runs: list[str],
    out: str | None = None,
    plot: str | None = None,
) -> None:
    """Print the table as Markdown.

    Args:
        runs: work folders of finished runs, each with a summary.json.
        plot: an .svg or .png file for the curves.
    """
    summaries = [json.loads((ROOT / folder / "summary.json").read_text()) for folder in runs]
    text = table(summaries)
    print(text)
    if out:
        Path(out).write_text(text + "\n")
    if plot:
        draw(summaries, plot)


def table(summaries: list[dict]) -> str:
    """Accuracies in per cent, before, after GRPO and after PPO; minutes and memory."""
    lines = [
        "| | " + " | ".join(f"seed {s['seed']}" for s in summaries) + " |",
        "|---" * (len(summaries) + 1) + "|",
    ]
    for kind in summaries[0]["accuracy"]:
        values = [s["accuracy"][kind] for s in summaries]
        cells = [" → ".join(f"{100 * value:.1f}" for value in row) for row in values]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    rows = {
        "same answers in transformers": [f"{s['same']}" for s in summaries],
        "minutes": [f"{s['minutes']:.0f}" for s in summaries],
        "GB, the largest process": [f"{s['gigabytes']:.1f}" for s in summaries],
    }
    return "\n".join([*lines, *(f"| {k} | {' | '.join(cells)} |" for k, cells in rows.items())])


def draw(summaries: list[dict], path: str) -> None:
    """The share of right rollouts by iteration: the seeds' mean, and a band over all of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    done = 0
    for stage, label in CURVES.items():
        values = [[100 * x for x in s["rewards"][stage]] for s in summaries]
        steps = range(done + 1, done + 1 + len(values[0]))
        draw_band(axes, steps, values, label, marker="o")
        done += len(values[0])
    axes.set(xlabel="iterations of GRPO", ylabel="right rollouts, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    run(main)
