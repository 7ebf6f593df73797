"""Generation beside `transformers.generate`, and beside what the machine could do.

    python benchmarks/generation.py --prompts_file GSM8K/test.jsonl \\
        --out docs/performance-generation.md

The same weights and prompts for both: the 58M Llama with random weights; prompts are the questions
of the file. Runs alternate and medians are given. transformers gets its best plain settings here:
one left-padded batch of all prompts, SDPA attention, its dynamic cache, sampling from the whole
vocabulary as ours does.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import (
    alternate,
    machine,
    make_model,
    make_tokenizer,
    median,
    read_rate,
    seconds,
    torchrun,
)

from src.cli import run
from src.parallel.setup import matmul_rate

# one token in a hundred ends a text: lengths vary as they do for a trained model
STOPS = set(range(100, 420))
SERVED = {  # new tokens at most, and what ends a text
    "varying lengths, at most 256 new": (256, STOPS),
    "128 new each": (128, set()),
}
LARGER = dict(dim=1536, n_layers=16, n_heads=12, n_kv_heads=12, hidden_dim=4096)  # 552M
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_engine(folder: Path, dtype: torch.dtype, slots: int, streamed: bool = False):
    from src.checkpoint.load import load_model
    from src.checkpoint.source import Checkpoint
    from src.generation.engine import Engine
    from src.parallel.setup import start

    parallel = start()
    model = load_model(Checkpoint.open(str(folder)), parallel, dtype, streamed=streamed).eval()
    return Engine(model, parallel, slots, 8192)


def ours(engine, prompts: list[list[int]], new: int, stops: set[int], seed: int = 1) -> float:
    """Tokens per second."""
    from src.generation.sampling import Sampling

    completions, sampling = [], Sampling(max_new_tokens=new, temperature=1.0, seed=seed)
    took = seconds(lambda: completions.extend(engine.generate(prompts, sampling, stops)))
    return sum(len(c.tokens) for c in completions) / took


def theirs(model, prompts: list[list[int]], new: int, stops: set[int], seed: int = 1) -> float:
    """Tokens per second."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])  # [prompts, longest]
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(seed)
    settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    settings |= dict(eos_token_id=sorted(stops) or None, max_new_tokens=new)
    if not stops:
        settings["min_new_tokens"] = new
    outputs = []

    def generate() -> None:
        outputs.append(model.generate(input_ids=ids, attention_mask=mask, **settings))

    took = seconds(generate)
    rows = outputs[0][:, longest:].tolist()  # [prompts, new]
    lengths = [
        next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows
    ]
    return sum(lengths) / took


def against_transformers(folder: Path, prompts: list[list[int]], rounds: int) -> list[str]:
    from transformers import AutoModelForCausalLM

    lines = ["| | ours, tokens/s | transformers, tokens/s | ratio |", "|---|---|---|---|"]
    for name, dtype in DTYPES.items():
        engine = open_engine(folder, dtype, 64)
        loaded = dict(dtype=dtype, attn_implementation="sdpa")
        model = AutoModelForCausalLM.from_pretrained(folder, **loaded).eval()
        model.generation_config.eos_token_id = None
        for label, (new, stops) in SERVED.items():
            runs = {
                "ours": partial(ours, engine, prompts[:64], new, stops),
                "theirs": partial(theirs, model, prompts[:64], new, stops),
            }
            rates = alternate(runs, rounds)
            a, b = median(rates["ours"]), median(rates["theirs"])
            lines.append(f"| {name}, 64 prompts, {label} | {a:.0f} | {b:.0f} | {a / b:.2f} |")
            print(lines[-1], flush=True)
    return lines


def rank_main(folder: str, prompts_file: str, dtype: str) -> None:
    """One of the ranks of `ranks_against_process`, or the one process: prints tokens per second."""
    prompts = json.loads(Path(prompts_file).read_text())
    engine = open_engine(Path(folder), DTYPES[dtype], 64)
    ours(engine, prompts, 16, set())
    rate = ours(engine, prompts, 64, set())
    if engine.parallel.is_main:
        print(f"RATE {rate}")


def ranks_against_process(
    folder: Path, prompts: list[list[int]], rounds: int, work: Path
) -> list[str]:
    prompts_file = work / "prompts.json"
    prompts_file.write_text(json.dumps(prompts[:64]))
    cores = len(os.sched_getaffinity(0))
    lines = [
        "| 64 prompts, 64 new each "
        f"| 1 process × {cores} threads | {cores} ranks × 1 thread | ratio |",
        "|---|---|---|---|",
    ]

    def launch(dtype: str, n: int) -> float:
        command = [*torchrun(n), __file__, "rank", str(folder), str(prompts_file), dtype]
        environment = {**os.environ, "OMP_NUM_THREADS": str(cores // n)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return float(done.stdout.split("RATE ")[1].split()[0])

    for dtype in DTYPES:
        runs = {"one": partial(launch, dtype, 1), "two": partial(launch, dtype, cores)}
        rates = alternate(runs, rounds, warm_up=False)
        a, b = median(rates["one"]), median(rates["two"])
        lines.append(f"| {dtype} | {a:.0f} | {b:.0f} | {b / a:.2f} |")
        print(lines[-1], flush=True)
    return lines


OF_TREE = """
import json, sys
tree, folder, prompts_file, dtype, new, stops = sys.argv[1:]
sys.path[:0] = [tree, tree + "/benchmarks"]
from pathlib import Path
import generation  # that folder's
prompts = json.loads(Path(prompts_file).read_text())
engine = generation.open_engine(Path(folder), generation.DTYPES[dtype], 64)
generation.ours(engine, prompts, 16, set())
print("RATE", generation.ours(engine, prompts, int(new), set(json.loads(stops))))
"""


def against_tree(
    folder: Path, prompts: list[list[int]], rounds: int, work: Path, tree: str
) -> list[str]:
    """Beside another commit, checked out in a folder, in turns."""
    prompts_file = work / "prompts.json"
    prompts_file.write_text(json.dumps(prompts[:64]))
    lines = ["| | now, tokens/s | before, tokens/s | ratio |", "|---|---|---|---|"]

    def launch(root: str, dtype: str, served: str) -> float:
        new, stops = SERVED[served]
        told = [root, str(folder), str(prompts_file), dtype, str(new), json.dumps(sorted(stops))]
        command = [sys.executable, "-c", OF_TREE, *told]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout.split("RATE ")[1].split()[0])

    here = str(Path(__file__).resolve().parent.parent)
    for dtype in DTYPES:
        for served in SERVED:
            runs = {
                "now": partial(launch, here, dtype, served),
                "before": partial(launch, tree, dtype, served),
            }
            rates = alternate(runs, rounds, warm_up=False)
            a, b = median(rates["now"]), median(rates["before"])
            lines.append(f"| {dtype}, 64 prompts, {served} | {a:.0f} | {b:.0f} | {a / b:.2f} |")
            print(lines[-1], flush=True)
    return lines


def roofline(folder: Path, rounds: int) -> list[str]:
    """A decode step's least time, by the bytes that it reads and by the products that it computes.

    Every byte of weights and cache is read once, and every product goes at the matmul rate. A step
    is all that it takes to get the next tokens: the forward, the choice, the host's part. The read
    rate is measured before and after each, since it changes where others have the machine, too.
    """
    lines = [
        "| | step, ms | bytes, MB | at the read rate, ms (GB/s) "
        "| products, GFLOP | at the matmul rate, ms | fraction reached |",
        "|---|---|---|---|---|---|---|",
    ]
    larger = make_model(folder.parent / "550m", **LARGER)
    for name, dtype in DTYPES.items():
        rate = matmul_rate(dtype, CPU)
        for size, batches in ((folder, (1, 8, 64, 256)), (larger, (1,))):
            for batch in batches:
                label = f"{name}, {size.name}, batch {batch}"
                lines.append(roofline_row(label, open_engine(size, dtype, batch), rate, rounds))
                print(lines[-1], flush=True)
    rates = [f"{matmul_rate(d, CPU) / 1e9:.0f} GFLOP/s in {n}" for n, d in DTYPES.items()]
    return [f"Matmul rate {', '.join(rates)}.", "", *lines]


def roofline_row(label: str, engine, rate: float, rounds: int, length: int = 128) -> str:
    model, batch = engine.model, engine.max_batch_size
    dtype = model.norm.weight.dtype
    rows = [[(7 * i + j) % 3000 + 3 for j in range(length - 8)] for i in range(batch)]
    bandwidth = read_rate()
    took = min(step_seconds(engine, rows, 10 * rounds))
    bandwidth = max(bandwidth, read_rate())
    weights = sum(p.numel() for n, p in model.named_parameters() if "tok_embeddings" not in n)
    of_context = 2 * length * model.config.dim * model.config.n_layers  # of a sequence
    read = (weights + batch * of_context) * dtype.itemsize
    work = 2 * batch * (weights + of_context)
    least = max(read / bandwidth, work / rate)
    return (
        f"| {label}, {length} tokens of context | {1e3 * took:.2f} | {read / 1e6:.0f} "
        f"| {1e3 * read / bandwidth:.2f} ({bandwidth / 1e9:.1f}) | {work / 1e9:.2f} "
        f"| {1e3 * work / rate:.2f} | {least / took:.2f} |"
    )


def session_of(engine, n: int, longest: int, new: int, in_a_hurry: bool = True):
    from src.generation.engine import Session, Stop
    from src.generation.sampling import Sampling

    sampling = Sampling(max_new_tokens=new, temperature=1.0, seed=1)
    return Session(engine, sampling, Stop(frozenset()), n, longest, in_a_hurry=in_a_hurry)


def step_seconds(engine, prompts: list[list[int]], steps: int) -> list[float]:
    """Of each of some decode steps of all prompts together."""
    from src.generation.scheduler import Request

    n, new = len(prompts), steps + 4
    with session_of(engine, n, max(map(len, prompts)) + new, new, in_a_hurry=False) as session:
        for i, prompt in enumerate(prompts):
            session.add(Request(prompt, new, i, i))
        while len(session.scheduler.running) < n:  # reads the prompts
            session.step()
        return [seconds(session.step) for _ in range(steps)]


def stalls(folder: Path, prompts: list[list[int]], rounds: int) -> list[str]:
    """How long steps of 16 running sequences take while 16 prompts of 4,000 tokens are read."""
    from src.generation.scheduler import Request

    lines = ["| | step without, ms | longest step with, ms | median, ms | steps |"]
    lines.append("|---|---|---|---|---|")
    for name, dtype in DTYPES.items():
        engine = open_engine(folder, dtype, 32)
        with session_of(engine, 32, 6000, 1900) as session:
            for i in range(16):
                session.add(Request(prompts[i], 1900, i, i))
            session.step()
            alone = median([seconds(session.step) for _ in range(10)])
            long = [Request([(5 * i + j) % 3000 + 3 for j in range(4000)], 4, i) for i in range(16)]
            for request in long:
                session.add(request)
            took = []
            while not all(request.tokens for request in long):
                took.append(seconds(session.step))
        lines.append(
            f"| {name} | {1e3 * alone:.1f} | {1e3 * max(took):.0f} | {1e3 * median(took):.0f} "
            f"| {len(took)} |"
        )
        print(lines[-1], flush=True)
    return lines


def scaling(folder: Path, prompts: list[list[int]], rounds: int) -> list[str]:
    """Cost per token from 64 to 512 prompts in the queue, and from contexts of 128 to 1024."""
    engine = open_engine(folder, torch.float32, 64)
    runs = {str(n): partial(ours, engine, prompts[:n], 48, set()) for n in (64, 128, 256, 512)}
    queue = alternate(runs, rounds)
    lines = [
        "| prompts in the queue, 64 slots, 48 new each | " + " | ".join(queue) + " |",
        "|---|" + "---|" * len(queue),
        "| tokens/s | " + " | ".join(f"{median(v):.0f}" for v in queue.values()) + " |",
        "",
    ]
    flat = [p for p in prompts if len(p) >= 32][0]
    of_length = {n: [(flat * 40)[:n]] * 16 for n in (128, 256, 512, 1024)}
    runs = {str(n): lambda n=n: 16 / decode_seconds(engine, of_length[n]) for n in of_length}
    context = alternate(runs, rounds)
    cost = {n: 1e3 / median(v) for n, v in context.items()}
    megabytes = [2 * int(n) * 512 * 8 * 4 / 1e6 for n in cost]
    lines += [
        "| tokens of context, 16 slots | " + " | ".join(cost) + " |",
        "|---|" + "---|" * len(cost),
        "| ms per token | " + " | ".join(f"{v:.3f}" for v in cost.values()) + " |",
        "| cache, MB per slot | " + " | ".join(f"{size:.1f}" for size in megabytes) + " |",
    ]
    print("\n".join(lines), flush=True)
    return lines


def streamed(folder: Path, prompts: list[list[int]], rounds: int) -> list[str]:
    """A step of more and more sequences, with layers that come in turn (--offload_params).

    On the CPU they are copied and packed each time, beside nothing: more than a GPU's would cost.
    """
    plain, in_turn = (open_engine(folder, torch.float32, 256, way) for way in (False, True))
    lines = ["| sequences | a step, ms | with --offload_params, ms | ratio |", "|---|---|---|---|"]
    for n in (1, 8, 64, 256):
        some = [p[:32] for p in prompts if len(p) >= 32][:n]
        runs = {
            "plain": partial(decode_seconds, plain, some),
            "in turn": partial(decode_seconds, in_turn, some),
        }
        a, b = (1e3 * median(took) for took in alternate(runs, rounds).values())
        lines.append(f"| {len(some)} | {a:.1f} | {b:.1f} | {b / a:.2f} |")
        print(lines[-1], flush=True)
    return lines


def decode_seconds(engine, prompts: list[list[int]]) -> float:
    """Of one decode step: the difference that 16 more steps make."""
    from src.generation.sampling import Sampling

    def generate(new: int) -> None:
        engine.generate(prompts, Sampling(max_new_tokens=new, temperature=0.0), set())

    took = [seconds(partial(generate, new)) for new in (1, 17)]
    return (took[1] - took[0]) / 16


def main(
    prompts_file: str,
    out: str | None = None,
    rounds: int = 3,
    only: str | None = None,
    before: str | None = None,
):
    """Run, print, and write a Markdown file.

    Args:
        prompts_file: .jsonl with "question" in each line, such as GSM8K's test file.
        out: the file to write; none when not given.
        rounds: of each comparison.
        only: transformers, ranks, roofline, scaling, stalls, streamed or before; all when not
            given.
        before: a folder with another commit of this suite, to be compared with.
    """
    import sentencepiece

    work = Path(tempfile.gettempdir()) / "benchmarks"
    folder = make_model(work / "58m")
    texts = [json.loads(line)["question"] for line in Path(prompts_file).read_text().splitlines()]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(make_tokenizer(folder, texts)))
    prompts = [[1, *tokenizer.encode(text)] for text in texts]
    parts = {
        "transformers": (
            "Beside `transformers.generate`",
            lambda: against_transformers(folder, prompts, rounds),
        ),
        "ranks": (
            "Ranks beside threads",
            lambda: ranks_against_process(folder, prompts, rounds, work),
        ),
        "roofline": ("Beside the roofline", lambda: roofline(folder, rounds)),
        "scaling": ("Queue and context", lambda: scaling(folder, prompts, rounds)),
        "stalls": (
            "Steps beside 16 prompts of 4,000 tokens",
            lambda: stalls(folder, prompts, rounds),
        ),
        "streamed": ("Layers that come in turn", lambda: streamed(folder, prompts, rounds)),
    }
    if before:
        parts["before"] = (
            "Beside another commit",
            lambda: against_tree(folder, prompts, rounds, work, before),
        )
    lines = [f"Machine: {machine()}.", ""]
    print(lines[0], flush=True)
    for name, (title, part) in parts.items():
        if only in (None, name):
            lines += [f"### {title}", "", *part(), ""]
    if out:
        Path(out).write_text("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank_main(*sys.argv[2:])
    else:
        run(main)
