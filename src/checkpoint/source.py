"""A checkpoint of any format, cut for any degree, seen as whole tensors in Meta's names of which any slice can be read.

Everything else follows from it: loading a rank reads its slices, splitting reads each rank's, merging reads them whole.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint.files import SUFFIXES, TensorFile, indexed_files, read_json
from src.errors import UserError
from src.models.config import SIZES, ModelConfig, config_from_hf, config_from_params
from src.models.layout import tensor_table
from src.models.llama import COMPUTED, HF_NAMES, PRESETS, ROTARY

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def generalised(name: str) -> str:
    """`layers.7.ffn_norm.weight` → `layers.{}.ffn_norm.weight`."""
    return re.sub(r"(?<=layers\.)\d+(?=\.)", "{}", name)


def to_hf_name(name: str) -> str:
    layer = re.search(r"layers\.(\d+)\.", name)
    return HF_NAMES[generalised(name)].format(*layer.groups() if layer else ())


def to_interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Hugging Face's row order of wq / wk (halves) → Meta's (interleaved pairs), head by head; [heads · head_dim, …]."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_interleaved`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


class Checkpoint:
    """Open with `Checkpoint.open`. `config`: the sizes; `table`: name → TensorSpec of every weight in it."""

    def __init__(self, folder: Path, config: ModelConfig, parts: list[dict[str, TensorFile]], hf: bool) -> None:
        """parts: for each shard, which file holds each tensor (by the file's own names). HF checkpoints have one."""
        self.folder, self.parts, self.hf = folder, parts, hf
        self.config = self._settle(config)
        self.table = tensor_table(self.config)
        self._check()

    @classmethod
    def open(cls, path: str, config_file: str | None = None) -> "Checkpoint":
        """path: a Hugging Face folder, a folder of consolidated shards, or one tensor file. Raises UserError."""
        try:
            return cls._open(Path(path), config_file)
        except OSError as error:
            raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None

    @classmethod
    def _open(cls, path: Path, config_file: str | None) -> "Checkpoint":
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        folder = path if path.is_dir() else path.parent
        files = _consolidated(folder) if path.is_dir() else [path]
        if path.is_dir() and not files:
            parts = [_hf_files(folder)]
        elif not path.is_dir() and path.suffix not in SUFFIXES:
            raise UserError(f"{path}: unknown kind of file; expected a folder or one of {', '.join(SUFFIXES)}")
        else:
            opened = [TensorFile(file) for file in files]
            parts = [{key: file for key in file.keys} for file in opened]
        hf = any(key.startswith("model.") or key == "lm_head.weight" for key in parts[0])
        return cls(folder, _config(folder, config_file), parts, hf)

    def check_finite(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, unless it holds NaN or infinity: then UserError. Its extremes tell, without a mask of its size."""
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(f"{self.folder}: NaN or infinite weights in {name}; the checkpoint is damaged")
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        return self._file("norm.weight").read(self._key("norm.weight")).dtype

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """A tensor in Meta's name and row order, whole or its [start, stop) along `dim`."""
        key = self._key(name)
        if self.hf:
            tensor = self.parts[0][key].read(key, dim, start, stop)
            if generalised(name) in ROTARY:
                if dim == 1:
                    raise ValueError(f"{name} is cut along its heads, not along dim 1")
                tensor = to_interleaved(tensor, self.config.head_dim)
            return tensor
        cut = self._shard_dim(name)
        if cut is None:
            return self.parts[0][key].read(key, dim, start, stop)
        size = self.table[name].shape[cut] // len(self.parts)
        if dim is None:
            dim, start, stop = cut, 0, self.table[name].shape[cut]
        if dim != cut:
            raise ValueError(f"{name} is stored cut along dim {cut} and was asked for along dim {dim}")
        pieces = []
        for i in range(start // size, (stop + size - 1) // size):
            first, last = max(start, i * size), min(stop, (i + 1) * size)
            pieces.append(self.parts[i][key].read(key, dim, first - i * size, last - i * size))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def local(self, name: str, rank: int, n: int) -> Tensor:
        """The slice of `name` that rank `rank` of `n` holds."""
        spec = self.table[name]
        return self.read(name) if spec.dim is None else self.read(name, spec.dim, *spec.local_range(rank, n))

    def _key(self, name: str) -> str:
        return to_hf_name(name) if self.hf else name

    def _file(self, name: str) -> TensorFile:
        return self.parts[0][self._key(name)]

    def _shard_dim(self, name: str) -> int | None:
        return self.table[name].dim if len(self.parts) > 1 else None

    def _settle(self, config: ModelConfig) -> ModelConfig:
        """Let the tensors decide what the config leaves open: the vocabulary of a `params.json` that says −1."""
        output = self.parts[0].get("output.weight")
        if config.vocab_size == -1 and output is not None:
            config = replace(config, vocab_size=output.shape("output.weight")[0] * len(self.parts))
        if config.vocab_size == -1:
            raise UserError(f"{self.folder}: vocab_size is -1 and there is no output.weight to take it from")
        return config

    def _check(self) -> None:
        """Every tensor there, of the right shape, and no other, in every shard; all problems in one message."""
        n, problems = len(self.parts), []
        computed = set(COMPUTED)
        wanted = {self._key(name): (name, spec) for name, spec in self.table.items()}
        if self.hf and self.config.tie_word_embeddings:
            computed.add("lm_head.weight")  # the embedding again, in files that spell the tie out
        for number, part in enumerate(self.parts):
            where = f"shard {number} of {n}: " if n > 1 else ""
            for key, (name, spec) in wanted.items():
                if key not in part:
                    problems.append(f"{where}{key} is missing")
                    continue
                found, expected = part[key].shape(key), spec.local_shape(n)
                kind, first = part[key].dtype(key), self.parts[0].get(key, part[key]).dtype(key)
                if kind is None or kind != first:
                    found_kind, expected_kind = kind or "no fp32, bf16 or fp16", first or "one of them"
                    problems.append(f"{where}{part[key].path.name}: {key} is {found_kind}, expected {expected_kind}")
                if found != expected:
                    problems.append(f"{where}{part[key].path.name}: {key} has shape {list(found)}, expected {list(expected)}")
            for key in part.keys() - wanted.keys():
                if generalised(key) not in computed:
                    problems.append(f"{where}{part[key].path.name}: unknown tensor {key}")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise UserError(f"{self.folder} does not hold the model its config describes: {'; '.join(problems[:5])}{more}")


def _consolidated(folder: Path) -> list[Path]:
    """Meta's shards in order. Raises UserError when one of the row is missing."""
    found = {}
    for path in folder.glob("consolidated*"):
        match = re.fullmatch(r"consolidated(?:\.(\d+))?\.(pth|safetensors)", path.name)
        if match:
            number = int(match[1] or 0)
            if number in found:
                raise UserError(f"{folder}: {found[number].name} and {path.name} are both shard {number}; remove one")
            found[number] = path
    holes = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if holes:
        names = ", ".join(f"consolidated.{i:02d}.pth" for i in holes)
        raise UserError(f"{folder}: {names} missing; shards up to consolidated.{max(found):02d} are there")
    return [found[i] for i in sorted(found)]


def _hf_files(folder: Path) -> dict[str, TensorFile]:
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            located = indexed_files(folder, index)
            opened = {path: TensorFile(path) for path in sorted(set(located.values()))}
            for key, path in located.items():
                if key not in opened[path].keys:
                    raise UserError(f"{index}: {key} is said to lie in {path.name}, which does not hold it")
            return {key: opened[path] for key, path in located.items()}
    for file in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        if file.is_file():
            opened = TensorFile(file)
            return {key: opened for key in opened.keys}
    raise UserError(
        f"{folder}: no checkpoint in it; expected consolidated.00.pth …, model.safetensors, pytorch_model.bin or their index"
    )


def _config(folder: Path, config_file: str | None) -> ModelConfig:
    """From the named file, else from the folder's `params.json` or `config.json`."""
    candidates = [Path(config_file)] if config_file else [folder / "params.json", folder / "config.json"]
    for path in candidates:
        if path.is_file():
            raw = read_json(path)
            return (config_from_params if "dim" in raw else config_from_hf)(raw, str(path))
    raise UserError(f"{' and '.join(str(path) for path in candidates)}: not there; give the model's sizes by --config_file")


def check_model_type(config: ModelConfig, model_type: str | None) -> None:
    """Raise UserError when a `--model_type` is unknown or disagrees with the checkpoint's own sizes."""
    if model_type is None:
        return
    if model_type not in PRESETS:
        raise UserError(f"--model_type {model_type}: unknown; one of {', '.join(PRESETS)}")
    preset = PRESETS[model_type]
    wrong = [
        f"{size} {getattr(config, size)} (a {model_type} has {getattr(preset, size)})"
        for size in SIZES
        if getattr(config, size) != getattr(preset, size)
    ]
    if wrong:
        raise UserError(f"--model_type {model_type} disagrees with the checkpoint: {', '.join(wrong)}; leave the flag out")
