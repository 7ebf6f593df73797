"""Two ranks with a model between them, on one device, against one rank of its own on the CPU."""

import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from src.generation.engine import Engine
from src.generation.sampling import Sampling
from src.models.batch import Batch, Sequence, response_logprobs
from src.parallel.setup import start, stop
from src.trainer.optimizer import Optimizer
from tests.gpu.models import CPU, MODELS, made_prompt, model_of
from tests.gpu.test_gpu_models import loss_of

PROMPTS = [made_prompt(i, 4 + 5 * i) for i in range(5)]


def close(ours: float, wanted: float, limit: float, what: str) -> None:
    assert abs(ours - wanted) <= limit * max(1.0, abs(wanted)), (what, ours, wanted)


def check(name: str, parallel, alone) -> None:
    config = MODELS[name]
    ours = model_of(config, parallel)
    with alone.active():
        exact = model_of(config, alone)

    # What the two draw, and what one forward says of it.
    engine = Engine(ours, parallel, 3, 96, kv_cache_gb=0.1)
    completions = engine.generate(PROMPTS, Sampling(max_new_tokens=12), set(range(2, 20)))
    drawn = [completion.tokens for completion in completions]
    both: list = [None, None]
    dist.all_gather_object(both, drawn)
    assert both[0] == both[1], name
    rows = [Sequence(p + c.tokens, len(p)) for p, c in zip(PROMPTS, completions)]
    with torch.no_grad(), alone.active():
        wanted, _ = response_logprobs(exact, Batch.of(rows, CPU))
    said = torch.tensor([logprob for c in completions for logprob in c.logprobs])
    close(float((said - wanted).abs().max()), 0.0, 2e-3, f"{name}: log-probabilities")

    # A step, whose gradient norm counts each weight once.
    norms = []
    for model, where in ((ours.train(), parallel), (exact.train(), alone)):
        with where.active():
            optimizer = Optimizer(model, where)
            loss = loss_of(model, where.device)
            optimizer.backward(loss, last=True)
            norms.append((float(loss), optimizer.step(1e-3)["grad_norm"]))
    for what, mine, theirs in zip(("loss", "gradient norm"), *norms):
        close(mine, theirs, 1e-3, f"{name}: {what}")


def main(kind: str) -> None:
    # Each rank takes the first GPU, as if it were alone there.
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    dist.init_process_group("gloo")
    parallel = start()
    assert parallel.device.type == kind and parallel.mp_size == 2
    torch.set_num_threads(1)
    # a model of its own on each rank, none of which knows of the other
    alone = replace(parallel.divided(1), device=CPU, dp_size=1, dp_rank=0)
    for name in ("llama", "norms of heads", "experts", "seven heads to a kv head"):
        check(name, parallel, alone)
    if parallel.is_main:
        print("two ranks give the same as one on the CPU")
    stop()


if __name__ == "__main__":
    main(sys.argv[1])
