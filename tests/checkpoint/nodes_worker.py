"""Saves steps on nodes that share no folder, loses parts of them, and says what is seen then.

    torchrun --nproc_per_node 4 tests/checkpoint/nodes_worker.py FOLDER

The four ranks of one launcher stand for nodes of two, and of one each, by what a launcher says in
the environment and by the folders that they work in. FOLDER/nodes.json gets what each rank saw.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from src.checkpoint.gathering import complete, fetch, keys_of, newest
from src.checkpoint.manifest import described, read_manifest
from src.checkpoint.nodes import Nodes
from src.checkpoint.save import save_model
from src.checkpoint.sending import PIECE_BYTES, Transfer, host_group, send_files
from src.checkpoint.source import Checkpoint
from src.checkpoint.steps import Steps, file_of, holders, random_file, step_facts
from src.errors import UserError
from src.parallel.setup import Parallel, agreed, start, stop
from tests.trainer.tiny import ours

STATE = Path("out-state")


def files(rank: int, step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    tensors = {f"weight/{rank}": torch.randn(40 + rank, 7, generator=generator)}
    return {file_of("model", 0, rank): tensors, random_file(rank): {"cpu": torch.arange(9)}}


FACTS = {
    "settings": {},
    "layouts": {"model": {"mp": 1, "dp": 4}},
    "counters": {"model": {}},
    "parts": {},
}


def here(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def refusal(work: Callable[[], object]) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return "nothing was refused"


class Seen:
    """What every rank saw, by name."""

    def __init__(self) -> None:
        self.all: dict[str, list[Any]] = {}

    def __call__(self, name: str, value: Any) -> None:
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, value)
        self.all[name] = every


def saved_and_lost(nodes: Nodes, parallel: Parallel, seen: Seen) -> None:
    """Steps of which nodes lose this and that."""
    first, rank = nodes.is_first, parallel.rank
    steps = Steps(STATE, 2, parallel, nodes=nodes, copies=2)
    for step in (1, 2, 3):
        # Facts are rank 0's, whatever others have.
        facts = FACTS if rank == 0 else {**FACTS, "parts": {"not": "rank 0's"}}
        steps.save(step, files(rank, step), facts)
    steps.wait()
    seen("steps", here(STATE))
    step = STATE / "step-00000003"
    manifest = read_manifest(step)
    seen("files", [name for name in here(step) if name != "manifest.json"])
    seen("manifest", manifest)
    seen("facts", step_facts(step)["step"])
    seen("newest", [str(newest(STATE, nodes)), complete(step, nodes)])
    seen("holders", holders(step, manifest, nodes))

    # The last node's disk is a new one: what its ranks read comes from others.
    last = nodes.count - 1
    if first and nodes.node == last:
        shutil.rmtree(STATE)
    dist.barrier()
    seen("newest, a disk lost", [str(newest(STATE, nodes)), complete(step, nodes)])
    held, _ = holders(step, manifest, nodes)
    seen("holders, a disk lost", held)
    keys = keys_of(step, manifest["files"], held, nodes)
    seen("keys", keys)
    target, wanted = Path("fetched"), set(files(rank, 3)) if nodes.node == last else set()
    seen("fetched", fetch(step, target, wanted, manifest, held, nodes, parallel))
    seen("fetched files", {name: described(target / name) for name in here(target)})

    # The next step is written by all; a node of it loses its renaming, another run's step is there.
    steps.save(4, files(rank, 4), FACTS)
    steps.wait()
    step = STATE / "step-00000004"
    if first and nodes.node == last:
        step.rename(STATE / ".tmp-step-00000004")
    if first and nodes.node == 0:
        shutil.copytree(step, STATE / ".tmp-step-00000009")  # none has renamed it
    dist.barrier()
    seen("newest, half renamed", [str(newest(STATE, nodes)), complete(step, nodes)])
    seen("finished", here(STATE))
    agreed(lambda: steps.remove_unfinished() if first else None)
    seen("swept", here(STATE))
    manifest = read_manifest(step)
    other = STATE / "step-00000003"  # a node that went on alone has another one of that number
    if first and nodes.node == last:
        other.mkdir(exist_ok=True)
        (other / "manifest.json").write_text(json.dumps({**manifest, "step": 3, "alone": 1}))
    dist.barrier()
    seen("reader of two", complete(other, nodes))
    manifest_3 = manifest if nodes.node == last else read_manifest(other)
    outcome: list[Any] = [manifest_3]
    dist.broadcast_object_list(outcome, src=0)
    aside = [path.name for path in steps.go_back_to(other, outcome[0])]
    seen("aside", aside)

    # One copy is damaged, then both, then both are gone.
    steps.save(5, files(rank, 5), FACTS)
    steps.wait()
    step = STATE / "step-00000005"
    manifest, name = read_manifest(step), file_of("model", 0, 0)
    for damaged in (0, 1):
        if first and nodes.node == damaged:
            data = bytearray((step / name).read_bytes())
            data[-1] ^= 1
            (step / name).write_bytes(data)
        dist.barrier()
        if damaged == 0:
            seen("one copy damaged", holders(step, manifest, nodes))
            held, _ = holders(step, manifest, nodes)
            wanted = {name} if rank == 0 else set()
            fetch(step, Path("again"), wanted, manifest, held, nodes, parallel)
            seen("fetched again", {name: described(Path("again") / name) for name in wanted})
        else:
            seen("both damaged", refusal(lambda: holders(step, manifest, nodes)))
    if first and nodes.node < 2:
        (step / name).unlink()
    dist.barrier()
    seen("both gone", refusal(lambda: holders(step, manifest, nodes)))


def sent(parallel: Parallel, seen: Seen) -> None:
    """A file of several pieces and an empty one to several ranks; one that is not what it was."""
    Path("from").mkdir(exist_ok=True)
    Path("to").mkdir(exist_ok=True)
    if parallel.rank == 1:
        generator = torch.Generator().manual_seed(1)
        numbers = torch.randint(256, (2 * PIECE_BYTES + 5,), generator=generator)
        Path("from/large").write_bytes(bytes(numbers.to(torch.uint8).numpy()))
        Path("from/empty").touch()
    dist.barrier()
    entries: list[Any] = [None]
    if parallel.rank == 1:
        entries = [{name: described(Path("from") / name) for name in ("large", "empty")}]
    dist.broadcast_object_list(entries, src=1)
    targets = [("large", 3), ("large", 2), ("empty", 2)]
    transfers = [Transfer(name, 1, target, entries[0][name]) for name, target in targets]
    with host_group(parallel) as group:
        seen("came", send_files(transfers, Path("from"), Path("to"), group))
        arrived = {
            t.name: described(Path("to") / t.name) == t.entry
            for t in transfers
            if t.target == parallel.rank
        }
        seen("arrived", arrived)
        wrong = [Transfer("large", 1, 0, {**entries[0]["large"], "sha256": "0" * 64})]
        lost = [Transfer("nowhere", 1, 0, entries[0]["large"])]
        for name, work in (("wrong", wrong), ("lost", lost)):
            seen(name, refusal(partial(send_files, work, Path("from"), Path("to"), group)))


def main(folder: Path) -> None:
    rank, results = int(os.environ["RANK"]), {}
    for per_node in (2, 1):
        node, seen = rank // per_node, Seen()
        os.environ |= {"LOCAL_WORLD_SIZE": str(per_node), "LOCAL_RANK": str(rank % per_node)}
        parallel = start(1, timeout=60)
        work = folder / f"of {per_node}" / f"node {node}"
        work.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        os.chdir(work)
        nodes = Nodes.find(STATE, parallel)
        seen("of_rank", nodes.of_rank)
        seen("left by the probe", here(Path(".")))
        shared = Nodes.find(folder / "shared" / "out-state", parallel)
        seen("shared", [shared.are_one, shared.launchers])
        saved_and_lost(nodes, parallel, seen)
        if per_node == 1:
            sent(parallel, seen)
        # A model of four ranks: its shards come to the first rank's node.
        tensor_parallel = start(4, timeout=60)
        base = Checkpoint.open(str(folder / "lm"))
        model = ours(folder / "lm", tensor_parallel)
        save_model(model, tensor_parallel, "model", base)
        seen("model", here(Path("model")))
        seen("around the model", [name for name in here(Path(".")) if "model" in name])
        results[per_node] = seen.all
        if rank == 0:
            shutil.copytree("model", folder / f"model of {per_node}")
        dist.barrier()
    if rank == 0:
        (folder / "nodes.json").write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
