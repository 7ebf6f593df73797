"""How right the time left was: runs a script as it is, and looks at its bars afterwards.

    python benchmarks/time_left.py solver_train.py --ckpt_dir CKPT --save_dir OUT ...

For each bar that ran for a while: what it said after a tenth of its seconds, and after half,
beside what was left then; and what the mean time per unit would have said.
"""

import contextlib
import math
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WHILE_S = 5.0  # shorter bars are passed over


def main(script: str) -> None:
    """Run it with the arguments that are left."""
    from src.progress import Progress

    # Of each bar after each update: elapsed seconds, time left, whether that is the most that it
    # can be, and the time left by the mean.
    said: dict[Progress, list[tuple[float, float, str, float]]] = {}
    ends: dict[Progress, float] = {}
    update, close = Progress.update, Progress.close

    def watched_update(bar, *args, **kwargs) -> None:
        update(bar, *args, **kwargs)
        units = bar.n - bar.initial
        plain = (bar.total - bar.n) * bar.elapsed / units if units else math.inf
        left = bar.seconds_left
        left, most = math.inf if left is None else left, "at most " * bar.is_bound()
        said.setdefault(bar, []).append((bar.elapsed, left, most, plain))

    def watched_close(bar) -> None:
        if not bar.disable:
            ends[bar] = bar.elapsed
        close(bar)

    Progress.update, Progress.close = watched_update, watched_close
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    for bar, moments in said.items():
        if (end := ends[bar]) < WHILE_S:
            continue
        print(f"{bar.desc}: {bar.total} {bar.unit}, {end:.1f} s")
        for part in (0.1, 0.5):
            at, left, most, plain = next(m for m in moments if m[0] >= part * end)
            errors = [f"{100 * (guess / (end - at) - 1):+.0f} %" for guess in (left, plain)]
            print(
                f"  at {at:.1f} s: {most}{left:.1f} s left, really {end - at:.1f} s ({errors[0]}); "
                f"by the mean per {bar.unit} {errors[1]}"
            )


if __name__ == "__main__":
    sys.argv.pop(0)
    main(sys.argv[0])
