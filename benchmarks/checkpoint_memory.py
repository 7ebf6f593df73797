"""How much memory and time it takes to split a checkpoint, and to load it straight from its folder.

    python benchmarks/checkpoint_memory.py --gigabytes 2 --n 4

Makes a random Llama of that size in bf16 as a Hugging Face folder (in files of at most a quarter of
it), splits it in a process of its own, then loads it on n ranks. Anonymous memory is what a process
cannot give back; mapped pages of files are the system's. Linux.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.cli import run


def own_figure(file: str, field: str) -> int:
    """A field of a file of this process in /proc."""
    lines = (Path("/proc/self") / file).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def status_bytes(field: str) -> int:
    return own_figure("status", field) * 1024


def read_bytes() -> int:
    """Bytes that this process asked the disk for (not what it found in the page cache)."""
    return own_figure("io", "read_bytes")


class Peak:
    """The largest anonymous memory above where it began, looked at every millisecond."""

    def __enter__(self) -> "Peak":
        self.start, self.peak, self._done = status_bytes("RssAnon"), 0, threading.Event()
        self.began = time.perf_counter()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, status_bytes("RssAnon") - self.start)

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self.began
        self._done.set()
        self._watcher.join()


def make(folder: Path, gigabytes: float) -> int:
    """A random Hugging Face checkpoint of about that size; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from src.checkpoint.names import hf_tensors
    from src.models.config import ModelConfig
    from src.models.hf_config import hf_config
    from src.models.layout import layer_table, tensor_table

    dim, hidden = 2048, 5632
    config = ModelConfig(dim, 1, 16, 16, 128, hidden, 32000)
    per_layer = sum(torch.Size(spec.shape).numel() for spec in layer_table(config).values())
    n_layers = round((gigabytes * 1e9 / 2 - 2 * 32000 * dim) / per_layer)
    config = ModelConfig(dim, n_layers, 16, 16, 128, hidden, 32000)
    folder.mkdir(parents=True)
    weight_map, tensors, number, total, limit = {}, {}, 0, 0, gigabytes * 1e9 / 4

    def flush() -> None:
        nonlocal number, tensors
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        number, tensors = number + 1, {}

    for name, spec in tensor_table(config).items():
        new = hf_tensors(name, torch.randn(spec.shape, dtype=torch.bfloat16) * 0.02, config)
        if sum(t.nbytes for t in tensors.values()) + sum(t.nbytes for t in new.values()) > limit:
            flush()
        tensors |= new
        total += sum(t.nbytes for t in new.values())
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(hf_config(config, "bfloat16", ids)))
    return total


def split_one(source: str, target: str, n: int) -> None:
    from src.checkpoint.source import Checkpoint
    from src.checkpoint.write import split

    with Peak() as peak:
        split(Checkpoint.open(source), Path(target), n)
    print(json.dumps({"peak": peak.peak, "seconds": peak.seconds, "read": read_bytes()}))


def load_one(source: str) -> None:
    import torch
    import torch.distributed as dist

    from src.checkpoint.load import load_model
    from src.checkpoint.source import Checkpoint
    from src.parallel.setup import start, stop

    parallel = start()
    dist.barrier()
    before = read_bytes()
    with Peak() as peak:
        model = load_model(Checkpoint.open(source), parallel, torch.bfloat16)
    report = {"peak": peak.peak, "held": sum(p.nbytes for p in model.parameters())}
    report |= {"seconds": peak.seconds, "read": read_bytes() - before}
    reports = [None] * parallel.world_size
    dist.all_gather_object(reports, report)
    if parallel.is_main:
        print(json.dumps(reports))
    stop()


def last_line(command: list[str]) -> dict | list:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the files' pages, so that reading them reads the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main(gigabytes: float = 2.0, n: int = 4, work_dir: str | None = None):
    """Measure and print.

    Args:
        gigabytes: of the checkpoint that is made.
        n: shards, and ranks that load it.
        work_dir: where to make it (twice its size is needed); a temporary folder when not given.
    """
    work = Path(tempfile.mkdtemp(dir=work_dir))
    try:
        total = make(work / "hf", gigabytes)
        largest = max(file.stat().st_size for file in (work / "hf").iterdir())
        drop_from_cache(work / "hf")
        shards = work / "shards"
        split = last_line(
            [sys.executable, __file__, "split", str(work / "hf"), str(shards), str(n)]
        )
        shard = max(file.stat().st_size for file in shards.glob("*.pth"))
        print(
            f"checkpoint {total / 1e9:.2f} GB in files of at most {largest / 1e9:.2f} GB; "
            f"a shard of {n}: {shard / 1e9:.3f} GB"
        )
        peak = split["peak"]
        print(
            f"split: peak {peak / 1e9:.3f} GB = {peak / (largest + shard):.2f} x "
            f"(one source file + one shard), {peak / shard:.2f} x the shard; "
            f"{split['seconds']:.1f} s; {split['read'] / total:.2f} x the checkpoint read"
        )
        drop_from_cache(work / "hf")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n)]
        ranks = last_line([*torchrun, __file__, "load", str(work / "hf")])
        worst = max(r["peak"] / r["held"] for r in ranks)
        read = sum(r["read"] for r in ranks)
        print(
            f"load on {n} ranks from the folder: "
            f"peak {worst:.3f} x the rank's own {ranks[0]['held'] / 1e9:.3f} GB at worst; "
            f"{max(r['seconds'] for r in ranks):.1f} s; "
            f"{read / total:.2f} x the checkpoint read from disk by all ranks together"
        )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    if sys.argv[1:2] == ["split"]:
        split_one(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["load"]:
        load_one(sys.argv[2])
    else:
        run(main)
