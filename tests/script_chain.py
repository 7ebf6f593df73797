"""Runs several of the repository's scripts one after another on the ranks that started it.

    torchrun --nproc_per_node N tests/script_chain.py COMMANDS.json

That is one launch instead of many. COMMANDS.json: [[script, flag, value, ...], ...]. Each script
runs as `__main__` and must end by itself; the process group is kept between them, which is all that
differs from launches of their own. Data set scripts run on rank 0 alone.
"""

import json
import runpy
import sys
from pathlib import Path

import torch.distributed as dist

from src.parallel import setup

ROOT = Path(__file__).resolve().parent.parent


def main(commands: list[list[str]]) -> None:
    leave = setup.stop
    setup.stop = lambda: dist.barrier()  # scripts import it when they run
    setup.start()
    for script, *arguments in commands:
        if not script.startswith("dataset/") or dist.get_rank() == 0:
            sys.argv = [script, *arguments]
            runpy.run_path(str(ROOT / script), run_name="__main__")
        dist.barrier()
    leave()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
