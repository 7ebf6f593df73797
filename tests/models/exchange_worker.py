"""One rank of test_exchange.py: models go from layout to layout, and are compared with loaded ones.

    exchange_worker.py FOLDER OUT

FOLDER holds a Hugging Face folder per case, and `wide`. OUT gets what was seen, as JSON.
"""

import json
import sys
from pathlib import Path

import numpy
import torch
import torch.distributed as dist

from src.checkpoint.load import allocate, load_model
from src.checkpoint.source import Checkpoint
from src.generation.relayout import Relayout
from src.models.exchange import Exchange
from src.models.layout import TensorSpec
from src.models.lora import LoRAConfig, merged
from src.models.places import Placement
from src.models.transformer import Transformer, build_part
from src.parallel.layout import Layout
from src.parallel.setup import Parallel, start, stop
from src.planner.measure import most_allocated

PAIRS = [  # from, to
    ("pp2 tp2", "dp4"),
    ("dp4", "pp2 tp2"),
    ("tp4", "pp2 dp2"),
    ("tp2", "tp4"),
    ("tp4", "tp2"),
    ("tp2 on 0-1", "tp2 on 2-3"),
    ("pp2 on 1-2", "tp3 on 1-3"),
    ("tp1 on 3", "tp4"),
    ("zero3", "tp2"),
    ("tp2 zero3", "tp4"),
    ("tp2 zero2", "pp2 dp2"),
    ("dp2 zero3 on 2-3", "tp2 on 0-1"),
    ("tp4", "tp4"),
]
SMALL = 2**12  # bytes of a bucket: many of them, and tensors in parts
WIDE = [("pp2 tp2", "dp4"), ("tp4", "dp4"), ("dp4", "tp4"), ("zero3", "tp2")]
WIDE_BUCKET = 2**21
LORA = LoRAConfig(rank=3, alpha=8.0, targets=("wq", "wo", "w2"))


def held(model: Transformer) -> int:
    return sum(weight.nbytes for weight in model.parameters())


def mask(spec: TensorSpec, placement: Placement, rank: int) -> numpy.ndarray:
    """Which numbers of a tensor a rank has."""
    has = numpy.zeros(spec.shape, dtype=bool)
    has[tuple(slice(*ends) for ends in placement.box(spec, rank))] = True
    return has


def one_pair(
    checkpoint: Checkpoint, parallel: Parallel, source: str, target: str, lora: LoRAConfig | None
) -> dict:
    world = parallel.world_size
    layouts = [Layout.parsed(text, world, "layout", 0) for text in (source, target)]
    before, after = (parallel.laid_out(layout) for layout in layouts)
    fp32 = torch.float32
    model = load_model(checkpoint, before, fp32, "lm", 1, lora=lora, zero=layouts[0].zero)
    # What is in memory is no longer what is on the disk.
    with torch.no_grad():
        for weight in model.parameters():
            getattr(weight, "_local_tensor", weight).mul_(2)
    want = load_model(checkpoint, after, fp32, "lm")
    relayout = Relayout(model, before, after)
    moves = relayout.exchange.moves
    got = build_part(model.config, after, fp32, relayout.stages).requires_grad_(False)
    allocate(got, parallel.device)
    exchange = Exchange(moves, parallel.rank, parallel.world, fp32, parallel.device, SMALL)
    with torch.no_grad():
        exchange(merged(model), dict(got.named_parameters()))
    again = relayout()
    parts = merged(model) if lora is not None and layouts[0] == layouts[1] else {}
    apart = 0.0
    for name, weight in got.named_parameters():
        wanted = parts[name]() if name in parts else 2 * want.get_parameter(name)
        if lora is None or parts:
            apart = max(apart, float((weight - wanted).abs().max()))
        assert torch.equal(weight, again.get_parameter(name)), name
    missing = sum(
        int((mask(move.spec, move.target, rank) & ~mask(move.spec, move.source, rank)).sum())
        for move in moves.values()
        for rank in range(world)
    )
    sent = torch.tensor(exchange.sent)
    dist.all_reduce(sent)
    names = [sorted(n for n, _ in each.named_parameters()) for each in (got, want)]
    return {
        "apart": apart,
        "same names": names[0] == names[1],
        "members": [before.is_member, after.is_member],
        "held": held(got),
        "sent": int(sent),
        "missing": 4 * missing,
        "buckets": len(exchange.buckets),
    }


def memory_of(checkpoint: Checkpoint, parallel: Parallel, source: str, target: str) -> dict:
    """What a move allocates at most, beside the part that it comes from."""
    layouts = [Layout.parsed(text, parallel.world_size, "layout", 0) for text in (source, target)]
    before, after = (parallel.laid_out(layout) for layout in layouts)
    model = load_model(checkpoint, before, torch.float32, "lm", zero=layouts[0].zero)
    relayout = Relayout(model, before, after, WIDE_BUCKET)
    new: list[Transformer] = []
    most = most_allocated(lambda: new.append(relayout()))
    return {"most": most, "own": held(new[0]), "bucket": WIDE_BUCKET}


def adapted(checkpoint: Checkpoint, parallel: Parallel) -> float:
    """An adapter is added in on the way, at another degree than it was made at."""
    models = []
    for text in ("tp4", "pp2 tp2"):
        division = parallel.laid_out(Layout.parsed(text, parallel.world_size, "layout"))
        model = load_model(checkpoint, division, torch.float32, "lm", 1, lora=LORA)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("lora_b"):  # the same at every degree
                    weight.fill_(0.02)
        models.append(Relayout(model, division, parallel.laid_out(Layout(2, tp=2)))())
    a, b = (dict(model.named_parameters()) for model in models)
    base = load_model(checkpoint, parallel.laid_out(Layout(2, tp=2)), torch.float32, "lm")
    moved = [n for n, w in base.named_parameters() if not torch.equal(w, a[n])]
    assert moved and all(name.rsplit(".", 2)[1] in LORA.targets for name in moved), moved
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def main(folder: str, out: str) -> None:
    parallel = start(1, timeout=120)
    torch.set_num_threads(1)
    results: dict = {"pairs": {}, "memory": {}}
    for case in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        checkpoint = Checkpoint.open(str(case))
        if case.name == "wide":
            for source, target in WIDE:
                key = f"{source} > {target}"
                results["memory"][key] = memory_of(checkpoint, parallel, source, target)
            continue
        for source, target in PAIRS:
            key = f"{case.name}: {source} > {target}"
            results["pairs"][key] = one_pair(checkpoint, parallel, source, target, None)
        results[f"{case.name}, adapted"] = adapted(checkpoint, parallel)
    every = [None] * parallel.world_size
    dist.all_gather_object(every, results)
    if parallel.is_main:
        Path(out).write_text(json.dumps(every))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
