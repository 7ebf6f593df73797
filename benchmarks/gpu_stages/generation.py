"""Decode steps by batch, and rollouts of one length, ragged and from a queue, by `Engine`."""

import torch
from common import alternate, copy_rate, median, random_model, seconds
from torch.profiler import ProfilerActivity, profile

from gpu_stages.shared import FULL, Say, Sizes, cache_bytes, made_prompts, weight_bytes
from src.generation.engine import Engine
from src.generation.sampling import Sampling
from src.parallel.setup import Parallel, start, stop

CACHE_GB = 60.0


def decode(sizes: Sizes, say: Say) -> None:
    """Steps by batch: milliseconds, share of the time that their bytes need at least, kernels."""
    parallel = start()
    model = random_model(sizes.decoder, parallel).eval()
    bandwidth = copy_rate(parallel.device, 2**30 if sizes is FULL else 2**20)
    low, high = sizes.new_tokens
    for n in sizes.batches:
        engine = engine_of(model, parallel, n, sizes.context + high)
        prompts = made_prompts(n, lambda i: sizes.context, sizes.decoder.vocab_size)

        def generate(new_tokens: int, engine=engine, prompts=prompts) -> None:
            engine.generate(prompts, Sampling(max_new_tokens=new_tokens), set())

        took = alternate(
            {
                name: lambda new=new: seconds(lambda: generate(new))
                for name, new in (("low", low), ("high", high))
            },
            sizes.rounds,
        )
        step = (median(took["high"]) - median(took["low"])) / (high - low)
        # every token of the cache that is there on average, and all weights, once
        context = sizes.context + (low + high) / 2
        least = (weight_bytes(model) + n * cache_bytes(model) * context) / bandwidth
        say(
            batch=n,
            ms=1e3 * step,
            tokens_per_s=n / step,
            roofline=least / step,
            **(device_use(generate, low, high) if parallel.device.type == "cuda" else {}),
        )
    stop()


def device_use(generate, low: int, high: int) -> dict[str, float]:
    """Kernels and copies of a step, and their milliseconds, by the difference of two lengths."""
    counts, busy = [], []
    for new_tokens in (low, high):
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            generate(new_tokens)
            torch.cuda.synchronize()
        on_device = [
            event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        counts.append(len(on_device))
        busy.append(sum(event.device_time for event in on_device) / 1e3)
    steps = high - low
    return {"kernels": (counts[1] - counts[0]) / steps, "busy_ms": (busy[1] - busy[0]) / steps}


def rollouts(sizes: Sizes, say: Say) -> None:
    """Tokens/s of a full batch, of one length and as they end, and of a queue of twice as many."""
    parallel = start()
    model = random_model(sizes.decoder, parallel).eval()
    vocab_size = sizes.decoder.vocab_size
    # Of these one in a hundred is drawn: a response has about 100 tokens.
    stops = set(range(2, 2 + vocab_size // 100))
    engine = engine_of(model, parallel, sizes.slots, 2 * sizes.new)

    def run(n: int, stops: set[int]) -> tuple[int, float]:
        prompts = made_prompts(n, lambda i: sizes.new // 2 + i % (sizes.new // 2 + 1), vocab_size)
        done: list = []
        sampling = Sampling(max_new_tokens=sizes.new)
        took = seconds(lambda: done.extend(engine.generate(prompts, sampling, stops)))
        return sum(len(completion.tokens) for completion in done), took

    kinds = {
        "one length": (sizes.slots, set()),
        "as they end": (sizes.slots, stops),
        "a queue of twice as many, as they end": (2 * sizes.slots, stops),
    }
    run(sizes.slots, set())  # warms up
    found = alternate(
        {name: lambda work=work: run(*work) for name, work in kinds.items()},
        min(sizes.rounds, 2),
        warm_up=False,
    )
    for name, runs in found.items():
        tokens, took = runs[0][0], median([took for _, took in runs])
        say(rollouts=f"{kinds[name][0]}, {name}", tokens=tokens, s=took, tokens_per_s=tokens / took)
    stop()


def engine_of(model, parallel: Parallel, slots: int, max_seq_len: int) -> Engine:
    on_gpu = parallel.device.type == "cuda"
    return Engine(model, parallel, slots, max_seq_len, CACHE_GB if on_gpu else 1.0)
