"""One rank of test_streaming.py: what each model generates and scores, with and without streaming.

    streaming_worker.py TASKS OUT

TASKS.json: {"prompts", "samplings": {name: {...}}, "models": {name: {"folder", ...}}}; OUT.json:
what came of each.
"""

import json
import sys
from pathlib import Path

import torch

from src.checkpoint.load import load_model
from src.checkpoint.source import Checkpoint
from src.generation.beam import BeamSearch
from src.generation.engine import Engine
from src.generation.sampling import Sampling
from src.models.batch import Batch, Sequence, response_logprobs, sequence_scores
from src.models.quantize import plain_parts
from src.parallel.host import storages_of
from src.parallel.setup import start, stop

SLOTS, LONGEST = 3, 100


@torch.no_grad()
def answers_of(model, parallel, prompts, samplings) -> dict:
    """Tokens and log-probabilities of the engine, of a search, and of whole sequences."""
    engine, found = Engine(model, parallel, SLOTS, LONGEST), {}
    for name, sampling in samplings.items():
        completions = engine.generate(prompts, Sampling(**sampling), {7})
        found[name] = [[c.tokens, c.logprobs] for c in completions]
    search = BeamSearch(model, parallel, SLOTS, LONGEST, None, 3)
    completions = search.generate(prompts[:2], Sampling(max_new_tokens=6), {7})
    found["beams"] = [[c.tokens, c.logprobs] for c in completions]
    batch = Batch.of([Sequence(prompt + [5, 6, 8], len(prompt)) for prompt in prompts], "cpu")
    found["scored"] = response_logprobs(model, batch)[0].tolist()
    return found


@torch.no_grad()
def scores_of(model, prompts) -> dict:
    """A verifier's."""
    return {"scores": sequence_scores(model, Batch.of([Sequence(p, 0) for p in prompts], "cpu"))}


def main(tasks: str, out: str) -> None:
    parallel, task, results = start(timeout=120), json.loads(Path(tasks).read_text()), {}
    torch.set_num_threads(1)
    for name, source in task["models"].items():
        dtype, head = getattr(torch, source.get("dtype", "float32")), source.get("head", "lm")
        results[name] = {}
        for way, streamed in (("plain", False), ("streamed", True)):
            checkpoint = Checkpoint.open(source["folder"], adapter_dir=source.get("adapter"))
            quantize = source.get("quantize")
            model = load_model(
                checkpoint, parallel, dtype, head, quantize=quantize, streamed=streamed
            ).eval()
            parts = [part for weight in model.parameters() for part in plain_parts(weight)]
            result = {"bytes": sum(s.nbytes() for s in storages_of(parts).values())}
            if head == "lm":
                result |= answers_of(model, parallel, task["prompts"], task["samplings"])
            else:
                result |= {k: x.tolist() for k, x in scores_of(model, task["prompts"]).items()}
            results[name][way] = result
        if model.streamed is not None:
            results[name]["in host memory"] = model.streamed.host_bytes
    if parallel.is_main:
        Path(out).write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
