"""One rank of tests/generation/test_generation.py: generates by each of the test's recipes, and draws with `choose`.

    generation_worker.py MODEL RECIPES OUT

RECIPES.json: {"prompts", "recipes": {name: {...}}, "choices": {name: {...}}, "families": {name: folder}}; OUT.json: what
came of each.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from src.checkpoint.load import load_model
from src.checkpoint.source import Checkpoint
from src.generation import sampling as sampling_module
from src.generation.beam import BeamSearch
from src.generation.cache import Cache, Decode, Prefill
from src.generation.engine import Engine, Stop, generate_sharded
from src.generation.relayout import RelaidEngine
from src.generation.sampling import Sampling, choose
from src.models.attention import Packed
from src.models.batch import Batch, Sequence, response_logprobs
from src.models.lora import LoRAConfig, add_lora
from src.parallel.setup import start, stop
from src.parallel.vocab import unpack_bits, vocab_range


def run_recipe(models, parallel, prompts, recipe) -> dict:
    model = models[recipe.get("dtype", "float32")]
    order = recipe.get("order") or list(range(len(prompts)))
    engine = Engine(
        model, parallel, recipe["slots"], recipe.get("max_seq_len", 200), recipe.get("kv_cache_gb")
    )
    strings = tuple(recipe.get("stop_strings", ()))
    told = []
    completions = generate_sharded(
        engine,
        [prompts[i] for i in order],
        Sampling(**recipe["sampling"]),
        Stop(set(recipe.get("stop_ids", ())), strings, lambda ids: "".join(f"<{i}>" for i in ids)),
        recipe.get("samples"),
        on_tokens=lambda finished, new, running: told.append((finished, new)),
    )
    result = {
        "tokens": [c.tokens for c in completions],
        "logprobs": [c.logprobs for c in completions],
        "stop_reason": [c.stop_reason for c in completions],
        "told": [sum(column) for column in zip(*told)],
        "steps": len(told),
    }
    if "temperature" in recipe["sampling"]:
        sequences = [
            Sequence(prompts[i] + c.tokens, len(prompts[i])) for i, c in zip(order, completions)
        ]
        temperature = recipe["sampling"]["temperature"] or 1.0
        batch = Batch.of(sequences, parallel.device)
        with torch.no_grad():
            scored = response_logprobs(model, batch, temperature)[0].split(batch.responses)
        result["scored"] = [row.tolist() for row in scored]
    return result


def run_relaid(model, parallel, prompts, sampling) -> dict:
    """At every smaller degree: tokens, with the model as it is and with an adapter beside it, and the degree's own numbers."""
    made, samples = {}, list(range(len(prompts)))
    for adapted in (False, True):
        if adapted:
            add_lora(model, LoRAConfig(2, 8.0), 1, parallel)
            for name, p in model.named_parameters():
                if name.endswith("lora_b"):  # the same at every degree
                    p.data.fill_(0.02)
            engine = Engine(model, parallel, 16, 200)
            made["with an adapter"] = [
                c.tokens for c in engine.generate(prompts, Sampling(**sampling), set())
            ]
        for n in (n for n in (1, 2) if n < parallel.mp_size):
            done = RelaidEngine(model, parallel, n, 16, 200).generate(
                prompts, Sampling(**sampling), set(), samples
            )
            made[f"{n}{', with an adapter' if adapted else ''}"] = [c.tokens for c in done]
    return made


def run_kept(model, parallel, prompts, sampling) -> list:
    """Which tokens of the whole vocabulary each choice was among, and the chosen."""
    done = Engine(model, parallel, 3, 200).generate(
        prompts, Sampling(**sampling), set(), keep_masks=True
    )
    kept = []
    for completion in done:
        mine = unpack_bits(completion.kept, model.vocabulary_part)[:, : model.vocabulary]
        parts = [None] * parallel.mp_size
        dist.all_gather_object(parts, mine, group=parallel.mp_group)
        kept.append([row.nonzero().flatten().tolist() for row in torch.cat(parts, 1)])
    return [kept, [c.tokens for c in done], [c.logprobs for c in done]]


def run_choice(parallel, choice) -> list[int]:
    """Many draws from one row of logits, told apart by their sample (or step)."""
    logits = torch.tensor(choice["logits"])
    first, last = vocab_range(logits.numel() // parallel.mp_size)
    n = choice["draws"]
    numbers, same = torch.arange(n), torch.full((n,), 3)
    samples, steps = (same, numbers) if choice["by_step"] else (numbers, same)
    tokens, logprobs = choose(
        logits[first:last].repeat(n, 1), Sampling(**choice["sampling"]), samples, steps
    )[:2]
    return [tokens.tolist(), logprobs.tolist()]


@torch.no_grad()
def run_family(model, parallel, prompts, sampling, whole: list[int], prefilled: list[int]) -> dict:
    """Greedy continuations, and how far logits token by token are from those of `whole` rows at once."""
    completions = Engine(model, parallel, 2, 200).generate(prompts, Sampling(**sampling), set())
    tokens = torch.tensor(
        [[(7 * i + 5 * j) % 90 + 3 for j in range(n)] for i, n in enumerate(whole)]
    )
    wanted = model.logits(model(tokens.flatten(), Packed(whole))).unflatten(0, (len(whole), -1))
    cache, lengths = Cache(model, len(whole), max(whole)), torch.tensor(prefilled)
    prompt = torch.cat([row[:n] for row, n in zip(tokens, prefilled)])
    layout = Prefill(prefilled, cache, 0, parallel.device)
    logits, worst = model.logits(model(prompt, layout))[layout.ends], 0.0
    rows = torch.arange(len(whole))
    for step in range(max(whole) - max(prefilled) + 1):
        at = lengths + step - 1  # the last token that was seen
        worst = max(worst, (logits - wanted[rows, at]).abs().max().item())
        if at.max() + 1 < max(whole):
            logits = model.logits(
                model(
                    tokens[rows, at + 1],
                    Decode(
                        cache, at + 1, lengths, [(0, 1, max(whole)), (1, len(whole), max(whole))]
                    ),
                )
            )
    seen = wanted[..., : model.vocabulary]  # without padding
    return {
        "tokens": [c.tokens for c in completions],
        "logprobs": [c.logprobs for c in completions],
        "step by step": worst / seen.abs().max().item() if seen.numel() else 0.0,
    }


def main(folder: str, recipes: str, out: str) -> None:
    parallel = start(timeout=120)
    sampling_module.CANDIDATES = 2  # so that top-p has to look again
    given = json.loads(Path(recipes).read_text())
    checkpoint = Checkpoint.open(folder)
    load = lambda where: {
        name: load_model(checkpoint, where, getattr(torch, name))
        for name in ("float32", "bfloat16")
    }
    models = load(parallel)
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    results = {
        name: run_recipe(models, parallel, given["prompts"], recipe)
        for name, recipe in given["recipes"].items()
    }
    results["kept"] = {
        kind: run_kept(models["float32"], parallel, given["prompts"][:4], s)
        for kind, s in given["kept"].items()
    }
    results["relaid"] = run_relaid(
        load(parallel)["float32"], parallel, given["prompts"], given["relaid"]
    )
    for beams, penalty in given["beams"]:
        search = BeamSearch(models["float32"], parallel, 5, 200, None, beams, penalty)
        done = generate_sharded(search, given["prompts"], Sampling(30), set(given["beam stops"]))
        results[f"{beams} beams, {penalty}"] = [c.tokens for c in done]
    results["choices"] = {
        name: run_choice(parallel, choice) for name, choice in given["choices"].items()
    }
    for name, where in given["families"].items():
        if parallel.world_size < 4 or name in given["families at four ranks"]:
            model = load_model(Checkpoint.open(where), parallel, torch.float32).eval()
            results[f"family {name}"] = run_family(model, parallel, **given["family"])
    if (
        parallel.world_size == 4
    ):  # once more as two models of two ranks each, which share the prompts
        parallel = start(2, timeout=120)
        models = load(parallel)
        results["relaid, two models"] = run_relaid(
            load(parallel)["float32"], parallel, given["prompts"], given["relaid"]
        )
        for name in given["sharded"]:
            results[f"sharded {name}"] = run_recipe(
                models, parallel, given["prompts"], given["recipes"][name]
            )
    if parallel.is_main:
        Path(out).write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
