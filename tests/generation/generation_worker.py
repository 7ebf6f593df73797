"""One rank of test_generation.py: generates by each of its recipes, and draws with `choose`.

    generation_worker.py MODEL RECIPES OUT

RECIPES.json: {"prompts", "recipes": {name: {...}}, "choices": {name: {...}},
"families": {name: folder}}; OUT.json: what came of each.
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
from src.generation.cache import Cache, Chunk, Decode, pages_for
from src.generation.engine import Engine, Stop, generate_sharded
from src.generation.relayout import RelaidEngine
from src.generation.sampling import Sampling, choose
from src.models.attention import Packed
from src.models.batch import Batch, Sequence, response_logprobs
from src.models.lora import LoRAConfig, add_lora
from src.parallel.layout import Layout
from src.parallel.setup import start, stop
from src.parallel.vocab import unpack_bits, vocab_range
from src.progress import AnswerLengths


def run_recipe(models, parallel, prompts, recipe) -> dict:
    model = models[recipe.get("dtype", "float32")]
    order = recipe.get("order") or list(range(len(prompts)))
    max_seq_len, kv_cache_gb = recipe.get("max_seq_len", 200), recipe.get("kv_cache_gb")
    engine = Engine(model, parallel, recipe["slots"], max_seq_len, kv_cache_gb)
    ids, strings = set(recipe.get("stop_ids", ())), tuple(recipe.get("stop_strings", ()))
    reports, lengths = [], AnswerLengths(len(prompts), recipe["sampling"]["max_new_tokens"])
    completions = generate_sharded(
        engine,
        [prompts[i] for i in order],
        Sampling(**recipe["sampling"]),
        Stop(ids, strings, lambda ids: "".join(f"<{i}>" for i in ids)),
        recipe.get("samples"),
        on_tokens=lambda ended, running: reports.append(
            (len(ended), lengths.step(ended, running)[0])
        ),
    )
    result = {
        "tokens": [c.tokens for c in completions],
        "logprobs": [c.logprobs for c in completions],
        "stop_reason": [c.stop_reason for c in completions],
        "told": [sum(column) for column in zip(*reports)],
        "steps": len(reports),
    }
    if "temperature" in recipe["sampling"]:
        pairs = zip([prompts[i] for i in order], completions)
        sequences = [Sequence(prompt + c.tokens, len(prompt)) for prompt, c in pairs]
        temperature = recipe["sampling"]["temperature"] or 1.0
        batch = Batch.of(sequences, parallel.device)
        with torch.no_grad():
            scored = response_logprobs(model, batch, temperature)[0].split(batch.responses)
        result["scored"] = [row.tolist() for row in scored]
    return result


def run_relaid(model, parallel, prompts, sampling) -> dict:
    """The tokens at every smaller degree, and with an adapter those of the own degree too.

    With the model as it is, and with an adapter beside it.
    """
    tokens, samples = {}, list(range(len(prompts)))
    sampling = Sampling(**sampling)
    for adapted in (False, True):
        if adapted:
            add_lora(model, LoRAConfig(2, 8.0), 1, parallel)
            for name, p in model.named_parameters():
                if name.endswith("lora_b"):  # the same at every degree
                    p.data.fill_(0.02)
            completions = Engine(model, parallel, 16, 200).generate(prompts, sampling, set())
            tokens["with an adapter"] = [c.tokens for c in completions]
        for n in (n for n in (1, 2) if n < parallel.mp_size):
            layout = Layout(parallel.world_size // n, tp=n)
            engine = RelaidEngine(model, parallel, layout, 16, 200)
            completions = engine.generate(prompts, sampling, set(), samples)
            tokens[f"{n}{', with an adapter' if adapted else ''}"] = [c.tokens for c in completions]
    return tokens


def run_kept(model, parallel, prompts, sampling) -> list:
    """Which tokens of the whole vocabulary each choice was among, and the chosen."""
    engine = Engine(model, parallel, 3, 200)
    completions = engine.generate(prompts, Sampling(**sampling), set(), keep_masks=True)
    kept = []
    for completion in completions:
        # [steps, vocabulary / n] of the rank, then [steps, vocabulary] of all
        part = unpack_bits(completion.kept, model.vocabulary_part)[:, : model.vocabulary]
        parts = [None] * parallel.mp_size
        dist.all_gather_object(parts, part, group=parallel.mp_group)
        kept.append([row.nonzero().flatten().tolist() for row in torch.cat(parts, 1)])
    return [kept, [c.tokens for c in completions], [c.logprobs for c in completions]]


def run_choice(parallel, choice) -> list[int]:
    """Many draws from one row of logits, told apart by their sample (or step)."""
    logits = torch.tensor(choice["logits"])  # [vocabulary]
    first, end = vocab_range(logits.numel() // parallel.mp_size)
    n = choice["draws"]
    numbers, same = torch.arange(n), torch.full((n,), 3)
    samples, steps = (same, numbers) if choice["by_step"] else (numbers, same)
    rows = logits[first:end].repeat(n, 1)  # [draws, vocabulary / n]
    tokens, logprobs = choose(rows, Sampling(**choice["sampling"]), samples, steps)[:2]
    return [tokens.tolist(), logprobs.tolist()]


@torch.no_grad()
def run_family(model, parallel, prompts, sampling, whole: list[int], prefilled: list[int]) -> dict:
    """Greedy continuations; how far logits token by token are from those of whole rows at once.

    whole: the rows' lengths; prefilled: with how many of its tokens each row begins.
    """
    completions = Engine(model, parallel, 2, 200).generate(prompts, Sampling(**sampling), set())
    n_rows, longest = len(whole), max(whole)
    tokens = torch.tensor(  # [rows, longest]
        [[(7 * i + 5 * j) % 90 + 3 for j in range(n)] for i, n in enumerate(whole)]
    )
    wanted = model.logits(model(tokens.flatten(), Packed(whole))).unflatten(0, (n_rows, -1))
    # wanted: [rows, longest, vocabulary / n]
    # The rows' pages lie one row's beside the other's.
    width = pages_for(longest)
    cache, lengths = Cache(model, n_rows * width), torch.tensor(prefilled)
    table = torch.arange(n_rows * width, dtype=torch.int32).view(width, n_rows).t()
    prompt = torch.cat([row[:n] for row, n in zip(tokens, prefilled)])  # [sum of prefilled]
    layout = Chunk(cache, prefilled, [0] * n_rows, table.tolist(), prefilled, parallel.device)
    logits = model.logits(model(prompt, layout))[layout.ends]  # [rows, vocabulary / n]
    worst, rows = 0.0, torch.arange(n_rows)
    for step in range(longest - max(prefilled) + 1):
        last = lengths + step - 1  # the last token that was seen, [rows]
        worst = max(worst, (logits - wanted[rows, last]).abs().max().item())
        if last.max() + 1 < longest:
            layout = Decode(cache, table, last + 1, lengths, longest)
            logits = model.logits(model(tokens[rows, last + 1], layout))
    unpadded = wanted[..., : model.vocabulary]
    return {
        "tokens": [c.tokens for c in completions],
        "logprobs": [c.logprobs for c in completions],
        "step by step": worst / unpadded.abs().max().item() if unpadded.numel() else 0.0,
    }


def main(folder: str, recipes: str, out: str) -> None:
    parallel = start(timeout=120)
    sampling_module.CANDIDATES = 2  # so that top-p has to look again
    tasks = json.loads(Path(recipes).read_text())
    prompts, recipe_of = tasks["prompts"], tasks["recipes"]
    checkpoint = Checkpoint.open(folder)

    def load(parallel, name):
        return load_model(checkpoint, parallel, getattr(torch, name))

    models = {name: load(parallel, name) for name in ("float32", "bfloat16")}
    model = models["float32"]
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    results = {}
    for name, recipe in recipe_of.items():
        results[name] = run_recipe(models, parallel, prompts, recipe)
    results["kept"] = {
        kind: run_kept(model, parallel, prompts[:4], sampling)
        for kind, sampling in tasks["kept"].items()
    }
    results["relaid"] = run_relaid(load(parallel, "float32"), parallel, prompts, tasks["relaid"])
    for beams, penalty in tasks["beams"]:
        search = BeamSearch(model, parallel, 5, 200, None, beams, penalty)
        completions = generate_sharded(
            search, prompts, Sampling(max_new_tokens=30), set(tasks["beam stops"])
        )
        results[f"{beams} beams, {penalty}"] = [c.tokens for c in completions]
    results["choices"] = {
        name: run_choice(parallel, choice) for name, choice in tasks["choices"].items()
    }
    for name, family_folder in tasks["families"].items():
        if parallel.world_size < 4 or name in tasks["families at four ranks"]:
            model = load_model(Checkpoint.open(family_folder), parallel, torch.float32).eval()
            results[f"family {name}"] = run_family(model, parallel, **tasks["family"])
    if parallel.world_size == 4:
        # once more as two models of two ranks each, which share the prompts
        parallel = start(2, timeout=120)
        models = {name: load(parallel, name) for name in ("float32", "bfloat16")}
        results["relaid, two models"] = run_relaid(
            load(parallel, "float32"), parallel, prompts, tasks["relaid"]
        )
        for name in tasks["sharded"]:
            results[f"sharded {name}"] = run_recipe(models, parallel, prompts, recipe_of[name])
    if parallel.is_main:
        Path(out).write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
