"""Is a checkpoint whole? Hashes, shapes, finite numbers, completeness.

    python checkpoint_verify.py --ckpt_dir sft

Takes any folder that the scripts read or write: shards (ours, in stages or not, or Meta's), a
Hugging Face folder, one tensor file, an adapter in PEFT's format (with --base_dir), a saved step of
a training run, or a SAVE_DIR-state folder with several. Exit code 0 when all is well, 2 with all
that is wrong.
"""

from functools import partial
from typing import Annotated

from src.cli import run


def main(
    ckpt_dir: Annotated[str, "what to verify"],
    config_file: Annotated[
        str | None, "the model's params.json or config.json; found in ckpt_dir when not given"
    ] = None,
    base_dir: Annotated[str | None, "the model that an adapter belongs to"] = None,
) -> None:
    """Look through everything, and say what was looked at."""
    from pathlib import Path

    from src.checkpoint.verify import reports_of
    from src.errors import UserError

    reports = reports_of(Path(ckpt_dir), config_file, base_dir)
    for report in reports:
        if not report.problems:
            print(report.summary)
    problems = [problem for report in reports for problem in report.problems]
    if problems:
        head = f"{len(problems)} problem{'s' * (len(problems) > 1)} found"
        raise UserError("\n  ".join([head, *problems]))


command = partial(run, main)

if __name__ == "__main__":
    command()
