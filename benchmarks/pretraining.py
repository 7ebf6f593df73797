"""Reading texts and rows for training, beside other software, side by side.

    python benchmarks/pretraining.py --tokenizer_file T.json [--text_file TEXT] [--only NAME]
        [--megabytes 20] [--rounds 5] [--out FILE]

- tokenising: our shards beside the tokenizers library's own `encode_batch` of the same documents in
  memory, and its `encode_batch_fast`, in turns; MB of text per second.
- memory: peak memory of dataset/build.py on larger and larger texts (--sizes, megabytes): one
  document without a line break, and rows.
- rows: a solver's rows, from a .jsonl to masked sequences: in memory, as small files are read, and
  kept on disk, made by all cores and found there later; beside `encode_batch` of the same texts.
- loading: tokens per second of loaders alone, and of the same model fed by each: ours with and
  without document mask, a memory map with random places as in nanoGPT, litdata's TokensLoader, and
  TRL's packed rows. The loader's share of ours is what a step spends before its first forward.

The text is Python's own library's sources when none is given: real text, on every machine.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import ROOT, alternate, median, report, seconds

from src.data import encoding
from src.data.stream import Stream
from src.data.tokenization import Texts, tokenize
from src.data.tokenizer import Tokenizer
from src.storage import CACHE_VARIABLE

ROW, BATCH = 1024, 4


def documents_of(text_file: str | None, megabytes: float) -> list[str]:
    """Texts of so many megabytes in all."""
    if text_file:
        texts = re.split(r"\n\n+", Path(text_file).read_text("utf-8"))
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
        texts = [file.read_text("utf-8", "ignore").replace("\0", "") for file in files]
    found, size = [], 0
    for text in filter(str.strip, texts):
        if size >= megabytes * 1e6:
            break
        found.append(text)
        size += len(text.encode())
    return found


def rows_file(folder: Path, documents: list[str]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def tokenising(args: argparse.Namespace) -> list[str]:
    documents = documents_of(args.text_file, args.megabytes)
    size = sum(len(text.encode()) for text in documents) / 1e6
    tokenizer = Tokenizer(Path(args.tokenizer_file))
    rust = tokenizer._rust  # the library's own object
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = Texts([str(rows_file(folder, documents))], "text", None, 10**8)

        def rate(work) -> float:
            began = time.perf_counter()
            work()
            return size / (time.perf_counter() - began)

        def ours() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as target:
                tokenize(texts, tokenizer, target)

        runs = {
            "ours: a .jsonl to shards on disk": lambda: rate(ours),
            "encode_batch, in memory": lambda: rate(
                lambda: rust.encode_batch(documents, add_special_tokens=False)
            ),
            "encode_batch_fast, in memory": lambda: rate(
                lambda: rust.encode_batch_fast(documents, add_special_tokens=False)
            ),
        }
        rates = alternate(runs, args.rounds)
    what = f"{size:.0f} MB in {len(documents)} documents"
    return beside_library(what, tokenizer, rates, "encode_batch, in memory")


def beside_library(
    what: str, tokenizer: Tokenizer, rates: dict[str, list[float]], theirs: str
) -> list[str]:
    """A table of rates, each also as a share of the one that is called `theirs`."""
    lines = [
        f"{what}, {tokenizer.path.name} with {tokenizer.vocab_size:,} ids; medians of "
        f"{len(rates[theirs])}:",
        "",
        "| | MB/s | to encode_batch |",
        "|---|---|---|",
    ]
    for name, values in rates.items():
        share = median(values) / median(rates[theirs])
        lines.append(f"| {name} | {median(values):.2f} | {share:.2f} |")
    return lines


def rows(args: argparse.Namespace) -> list[str]:
    documents = documents_of(args.text_file, args.megabytes)
    parts = [text[i : i + 4000] for text in documents for i in range(0, len(text), 4000)]
    halves = ((part[: len(part) // 4], part[len(part) // 4 :]) for part in parts)
    pairs = [(asked, said) for asked, said in halves if asked.strip() and said.strip()]
    texts = ["".join(pair) for pair in pairs]
    size = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer(Path(args.tokenizer_file))
    rust = tokenizer._rust
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "rows.jsonl"
        lines = (json.dumps({"instruction": asked, "output": said}) for asked, said in pairs)
        path.write_text("".join(line + "\n" for line in lines))

        def rate(kept_from: float, cache: str | None) -> float:
            encoding.KEPT_FROM = kept_from
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                os.environ[CACHE_VARIABLE] = cache or fresh
                return size / seconds(lambda: encoding.solver_sequences(path, tokenizer, 10**6))

        runs = {
            "in memory": lambda: rate(math.inf, None),
            "kept, made": lambda: rate(0, None),
            "kept, found": lambda: rate(0, str(folder / "cache")),
            "encode_batch": lambda: size / seconds(lambda: rust.encode_batch(texts)),
        }
        runs["kept, found"]()  # makes them
        rates = alternate(runs, args.rounds)
    return beside_library(f"{size:.0f} MB in {len(pairs)} rows", tokenizer, rates, "encode_batch")


# --- Memory ---------------------------------------------------------------------------------------


def peak_bytes(command: list[str], limit: float) -> tuple[int, float, bool]:
    """Peak memory of a process, its seconds, and whether it came to its end."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=None)
    peak, began = 0, time.perf_counter()
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None and time.perf_counter() - began < limit:
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        peak = int(found[1]) * 1024 if found else peak
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    is_done = process.poll() == 0
    process.kill()
    process.wait()
    return peak, time.perf_counter() - began, is_done


def memory(args: argparse.Namespace) -> list[str]:
    documents = documents_of(args.text_file, args.megabytes)
    line = re.sub(r"\s+", " ", " ".join(documents)) + " "
    lines = ["| input | MB | peak MB | seconds |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for megabytes in args.sizes:
            kinds = {"one line": folder / "one.txt", "rows": folder / "rows.jsonl"}
            for name, path in kinds.items():
                part = line if name == "one line" else None
                with path.open("w") as file:
                    while file.tell() < megabytes * 1e6:
                        if part is not None:
                            file.write(part[: int(megabytes * 1e6) - file.tell() + 1])
                        else:
                            file.writelines(json.dumps({"text": d}) + "\n" for d in documents)
                command = [sys.executable, "dataset/build.py", "pretrain", "--source", str(path)]
                command += ["--tokenizer_file", args.tokenizer_file]
                command += ["--save_dir", str(folder / f"{path.stem}-{megabytes}")]
                peak, seconds, is_done = peak_bytes(command, args.limit)
                size = path.stat().st_size / 1e6
                end = f"{seconds:.0f}" if is_done else f"stopped after {seconds:.0f}"
                lines.append(f"| {name} | {size:.0f} | {peak / 1e6:.0f} | {end} |")
                print(lines[-1], flush=True)
                path.unlink()
    return lines


# --- Loading --------------------------------------------------------------------------------------


def loading(args: argparse.Namespace) -> list[str]:
    from common import SIZES, config_of, random_model

    from src.models.batch import Batch
    from src.parallel.setup import start, stop
    from src.settings.model import PackedBatchSettings
    from src.settings.run import TrainingRunSettings
    from src.settings.training import OptimizerSettings
    from src.trainer.fit import train_step
    from src.trainer.optimizer import Optimizer
    from src.trainer.pretraining import PretrainingObjective
    from src.trainer.solver import SolverObjective

    documents = documents_of(args.text_file, args.megabytes)
    tokenizer = Tokenizer(Path(args.tokenizer_file))
    parallel = start(1)
    config = config_of(SIZES["dim"], SIZES["n_layers"], 64, SIZES["hidden_dim"])
    config = type(config)(**{**vars(config), "vocab_size": tokenizer.vocab_size})
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = Texts([str(rows_file(folder, documents))], "text", None, 10**8)
        tokenize(texts, tokenizer, str(folder / "shards"))
        device = parallel.device
        model = random_model(config, parallel, torch.float32)
        optimizer = Optimizer.of(OptimizerSettings(), model, parallel, TrainingRunSettings())
        batches = PackedBatchSettings(max_batch_size=BATCH, max_seq_len=ROW)

        class Given(SolverObjective):
            """Rows that another loader gives, ROW tokens each."""

            def __init__(self, batch_of) -> None:
                super().__init__([], device)
                self.batch_of = batch_of

            def begin(self, number, batch, model) -> None:
                self.rows = self.batch_of()  # [BATCH, ROW + 1]
                self.lengths = [ROW] * BATCH
                self.weights = self.needed = [ROW - 1] * BATCH

            def batch(self, rows) -> Batch:
                tokens = self.rows[rows, :ROW].long().flatten()
                return Batch(tokens, [ROW] * len(rows), [((1, ROW),)] * len(rows))

        def ours(mask: bool):
            stream = Stream.open(str(folder / "shards"), ROW, mask)
            return PretrainingObjective(stream, device)

        objectives = {
            "ours, documents masked": ours(True),
            "ours, across documents": ours(False),
            "a memory map, random places (nanoGPT)": Given(nanogpt(folder / "shards")),
            "TRL's packing": Given(trl_packed(documents, tokenizer)),
        }
        try:
            objectives["litdata's TokensLoader"] = Given(litdata(folder))
        except ImportError:
            lines.append("(litdata is not installed: pip install litdata)")
        number = dict.fromkeys(objectives, 0)
        shares: list[float] = []

        def rows_of(name: str) -> list[int]:
            first = number[name] * BATCH
            number[name] += 1
            of_stream = isinstance(objectives[name], PretrainingObjective)
            return list(range(first, first + BATCH)) if of_stream else list(range(BATCH))

        def alone(name: str) -> float:
            objective, began, tokens = objectives[name], time.perf_counter(), 0
            for _ in range(50):
                rows = rows_of(name)
                objective.begin(0, rows, model)
                objective.batch(rows)
                tokens += sum(objective.lengths[i] for i in rows)
            return tokens / (time.perf_counter() - began)

        def step(name: str) -> float:
            objective, rows, began = objectives[name], rows_of(name), time.perf_counter()
            objective.begin(0, rows, model)
            loaded = time.perf_counter()
            objective.batch(rows)
            loader = time.perf_counter() - began
            train_step(model, optimizer, objective, rows, batches, parallel, 1e-4)
            # the batch is made again within the step
            took = time.perf_counter() - began - (loader - (loaded - began))
            if name == "ours, documents masked":
                shares.append(loader / took)
            return sum(objective.lengths[i] for i in rows) / took

        names = list(objectives)
        alone_rates = alternate({n: lambda n=n: alone(n) for n in names}, args.rounds)
        step_rates = alternate({n: lambda n=n: step(n) for n in names}, args.rounds)
        parameters = sum(p.numel() for p in model.parameters())
        lines += [
            f"{parameters / 1e6:.0f}M parameters, fp32, {BATCH} rows of {ROW} tokens a step; "
            f"medians of {args.rounds}:",
            "",
            "| loader | tokens/s alone | tokens/s of training |",
            "|---|---|---|",
        ]
        for name in names:
            lines.append(
                f"| {name} | {median(alone_rates[name]):,.0f} | {median(step_rates[name]):,.0f} |"
            )
        lines += ["", f"The loader takes {100 * median(shares):.3f} % of a step of ours."]
    stop()
    return lines


def nanogpt(shards: Path):
    """nanoGPT's get_batch: random places in a memory map."""
    dtype = json.loads((shards / "index.json").read_text())["dtype"]
    generator = torch.Generator().manual_seed(0)

    def batch() -> torch.Tensor:
        data = np.memmap(shards / "tokens-00000.bin", dtype=dtype, mode="r")
        places = torch.randint(len(data) - ROW, (BATCH,), generator=generator)
        rows = [torch.from_numpy(data[i : i + ROW + 1].astype(np.int64)) for i in places]
        return torch.stack(rows)

    return batch


def trl_packed(documents: list[str], tokenizer: Tokenizer):
    """Rows of ROW tokens as TRL packs a data set ("wrapped"), shuffled by PyTorch's loader."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    ids = tokenizer.text_ids(documents, [False] * len(documents))
    rows = pack_dataset(Dataset.from_dict({"input_ids": ids}), ROW, "wrapped")
    rows = rows.filter(lambda row: len(row["input_ids"]) == ROW).with_format("torch")
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(rows, BATCH, shuffle=True, generator=generator)

    def endless():
        while True:
            yield from (batch["input_ids"] for batch in loader if len(batch["input_ids"]) == BATCH)

    found = endless()
    return lambda: next(found)


def _tokens(index: int) -> torch.Tensor:
    """A part of the shards' tokens, for litdata's workers."""
    data = np.memmap(os.environ["SHARD"], dtype=os.environ["SHARD_DTYPE"], mode="r")
    part = data[index * 10**5 : (index + 1) * 10**5]
    return torch.from_numpy(part.astype(np.int64))


def litdata(folder: Path):
    """litdata's way for language models: one string of tokens in chunks, read in random blocks."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    shards = folder / "shards"
    dtype = json.loads((shards / "index.json").read_text())["dtype"]
    os.environ |= {"SHARD": str(shards / "tokens-00000.bin"), "SHARD_DTYPE": dtype}
    count = (shards / "tokens-00000.bin").stat().st_size // np.dtype(dtype).itemsize
    optimize(
        fn=_tokens,
        inputs=list(range(count // 10**5)),
        output_dir=str(folder / "litdata"),
        chunk_size=(ROW + 1) * 1000,
        item_loader=TokensLoader(),
        num_workers=1,
    )
    data = StreamingDataset(
        str(folder / "litdata"), item_loader=TokensLoader(block_size=ROW + 1), shuffle=True
    )
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=0, drop_last=True)

    def endless():
        while True:
            yield from loader

    found = endless()
    return lambda: next(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer_file", required=True)
    parser.add_argument("--text_file")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sizes", type=lambda x: [int(n) for n in x.split(",")], default=[20, 2000]
    )
    parser.add_argument("--limit", type=float, default=1e9, help="seconds of a run of `memory`")
    parser.add_argument("--only", choices=("tokenising", "rows", "memory", "loading"))
    parser.add_argument("--out")
    args = parser.parse_args()
    args.tokenizer_file = str(Path(args.tokenizer_file).resolve())
    tables = {
        "tokenising": lambda: tokenising(args),
        "rows": lambda: rows(args),
        "memory": lambda: memory(args),
        "loading": lambda: loading(args),
    }
    report(tables, args.only, args.out)


if __name__ == "__main__":
    main()
