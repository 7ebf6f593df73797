"""Is a checkpoint whole? Hashes, shapes, finite numbers, completeness, of any folder that the scripts read or write.

    python checkpoint_verify.py --ckpt_dir sft

Takes shards (ours or Meta's), a Hugging Face folder, one tensor file, an adapter in PEFT's format (with --base_dir), a saved step of a
training run, or a SAVE_DIR-state folder with several. Exit code 0 when all is well, 2 with all that is wrong.
"""

from src.cli import run


def main(ckpt_dir: str, config_file: str | None = None, base_dir: str | None = None):
    """Look through everything, and say what was looked at.

    Args:
        ckpt_dir: what to verify.
        config_file: the model's params.json or config.json; found in ckpt_dir when not given.
        base_dir: the model that an adapter belongs to.
    """
    from pathlib import Path

    from src.checkpoint.steps import is_step
    from src.checkpoint.verify import adapter_report, model_report, step_report
    from src.errors import UserError

    folder = Path(ckpt_dir)
    try:
        steps = (
            [path for path in sorted(folder.iterdir()) if is_step(path) and path.is_dir()]
            if folder.is_dir()
            else []
        )
        if (folder / "adapter_config.json").is_file():
            reports = [adapter_report(folder, base_dir)]
        elif steps or (folder.is_dir() and is_step(folder.resolve())):
            reports = [step_report(step) for step in steps or [folder.resolve()]]
        else:
            reports = [model_report(folder, config_file)]
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    for report in reports:
        if not report.problems:
            print(report.summary)
    found = [problem for report in reports for problem in report.problems]
    if found:
        raise UserError(
            "\n  ".join([f"{len(found)} problem{'s' * (len(found) > 1)} found", *found])
        )


if __name__ == "__main__":
    run(main)
