"""A checkpoint of any format, cut for any degree, seen as whole tensors in Meta's names of which any slice can be read.

Everything else follows from it: loading a rank reads its slices, splitting reads each rank's, merging reads them whole.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint.adapter import Adapter
from src.checkpoint.files import SUFFIXES, TensorFile, indexed_files, read_json
from src.checkpoint.names import generalised, is_rotary, layer_of, to_interleaved
from src.errors import UserError
from src.models.config import SIZES, ModelConfig, config_from_params
from src.models.family import Stored
from src.models.hf_config import FAMILIES, PRESETS, config_from_hf
from src.models.layout import TensorSpec, layer_table, tensor_table

# Written into some released files, and computed here: not weights.
COMPUTED = (
    "rope.freqs",
    "layers.{}.attention.inner_attention.rope.freqs",
    "model.layers.{}.self_attn.rotary_emb.inv_freq",
    "transformer.rotary_emb.inv_freq",
    "transformer.h.{}.attn.rotary_emb.inv_freq",
    "transformer.h.{}.attn.bias",
    "transformer.h.{}.attn.masked_bias",
)


class Checkpoint:
    """Open with `Checkpoint.open`. `config`: the sizes; `table`: name → TensorSpec of every weight in it."""

    def __init__(
        self, folder: Path, config: ModelConfig, parts: list[dict[str, TensorFile]], hf: bool
    ) -> None:
        """parts: for each shard, which file holds each tensor (by the file's own names). HF checkpoints have one."""
        self.folder, self.parts, self.hf = folder, parts, hf
        self.config = self._settle(config)
        self.table = tensor_table(self.config)
        self.adapter: Adapter | None = None
        self._check()

    @classmethod
    def open(
        cls, path: str, config_file: str | None = None, adapter_dir: str | None = None
    ) -> "Checkpoint":
        """path: a Hugging Face folder, a folder of consolidated shards, or one tensor file. Raises UserError.

        adapter_dir: a folder in PEFT's format, whose adapter is added to every weight that is read.
        """
        try:
            checkpoint = cls._open(Path(path), config_file)
            if adapter_dir is not None:
                checkpoint.adapter = Adapter.open(adapter_dir, checkpoint.config)
                if (
                    checkpoint.adapter.score is not None
                ):  # a verifier's adapter makes a verifier of its base
                    checkpoint.config = checkpoint.config.with_head("score")
                    checkpoint.table = tensor_table(checkpoint.config)
            return checkpoint
        except OSError as error:
            raise UserError(
                f"{error.filename or path}: cannot be read ({error.strerror or error})"
            ) from None

    @classmethod
    def _open(cls, path: Path, config_file: str | None) -> "Checkpoint":
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        folder = path if path.is_dir() else path.parent
        files = _consolidated(folder) if path.is_dir() else [path]
        if path.is_dir() and not files:
            parts = [_hf_files(folder)]
        elif not path.is_dir() and path.suffix not in SUFFIXES:
            raise UserError(
                f"{path}: unknown kind of file; expected a folder or one of {', '.join(SUFFIXES)}"
            )
        else:
            opened = [TensorFile(file) for file in files]
            parts = [dict.fromkeys(file.keys, file) for file in opened]
        hf = any(
            key.startswith(("model.", "transformer.")) or key == "lm_head.weight"
            for key in parts[0]
        )
        return cls(folder, _config(folder, config_file), parts, hf)

    def release(self) -> None:
        """Let go of the files' pages; what is read later opens them again."""
        for file in {id(file): file for part in self.parts for file in part.values()}.values():
            file.release()

    def check_finite(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, unless it holds NaN or infinity: then UserError. Its extremes tell, without a mask of its size."""
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(
                f"{self.folder}: NaN or infinite weights in {name}; the checkpoint is damaged"
            )
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        place = self._places("norm.weight")[0]
        return self.parts[0][place].dtype(place)

    def bytes_of(self, name: str, dtype: torch.dtype | None = None) -> int:
        """Bytes of a whole tensor, in its own dtype or another."""
        if dtype is None:
            key = self._places(name)[0]
            dtype = (
                self.parts[0][key].dtype(key) if key in self.parts[0] else self.dtype
            )  # an adapter's score head
        return torch.Size(self.table[name].shape).numel() * dtype.itemsize

    def read(
        self, name: str, dim: int | None = None, start: int = 0, stop: int = 0, merged: bool = True
    ) -> Tensor:
        """A tensor in Meta's name and row order, whole or its [start, stop) along `dim`; with the adapter's part when `merged`."""
        if name == "score.weight" and self.adapter and self.adapter.score is not None:
            return self.adapter.score.to(self.dtype)
        cuts = {} if dim is None else {dim: (start, stop)}
        if len(self.parts) > 1 and self._shard_spec(name).dim is not None:
            tensor = self._read_shards(name, cuts)
        else:
            tensor = self._read_part(self.parts[0], name, cuts, self.table[name].shape)
        if self.hf and is_rotary(name):
            if dim == 1:
                raise ValueError(f"{name} is cut along its heads, not along dim 1")
            tensor = to_interleaved(tensor, self.config.head_dim)
        return (
            self.adapter.added_to(tensor, name, dim, start, stop)
            if self.adapter and merged
            else tensor
        )

    def local(self, name: str, rank: int, n: int, merged: bool = True) -> Tensor:
        """The part of `name` that rank `rank` of `n` holds, zeros behind it where its axis does not divide."""
        spec = self.table[name]
        if spec.dim is None:
            return self.read(name, merged=merged)
        return spec.padded(self.read(name, spec.dim, *spec.local_range(rank, n), merged), n)

    def _read_shards(self, name: str, cuts: dict[int, tuple[int, int]]) -> Tensor:
        """From several shards: of each the rows that are asked for, or, asked for along another axis, that much of all rows."""
        spec, pieces = self._shard_spec(name), []
        start, stop = cuts.get(spec.dim, (0, spec.shape[spec.dim]))
        for rank, first, last in spec.owners(len(self.parts)):
            low, high = max(start, first), min(stop, last)
            if low < high:
                shape = spec.local_shape(len(self.parts))
                pieces.append(
                    self._read_part(
                        self.parts[rank],
                        name,
                        {**cuts, spec.dim: (low - first, high - first)},
                        shape,
                    )
                )
        if not pieces:  # an empty range: a rank whose part is all padding
            return self._read_part(
                self.parts[0], name, {**cuts, spec.dim: (0, 0)}, spec.local_shape(len(self.parts))
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, spec.dim)

    def _read_part(
        self,
        part: dict[str, TensorFile],
        name: str,
        cuts: dict[int, tuple[int, int]],
        shape: tuple[int, ...],
    ) -> Tensor:
        """From one shard's files; `shape`: the tensor's in this shard."""
        stored, keys = self._stored(name), self._places(name)
        if stored.parts > 1:  # the index-th part of a fused tensor
            start, stop = cuts.get(stored.dim, (0, shape[stored.dim]))
            offset = stored.index * shape[stored.dim]
            cuts = {**cuts, stored.dim: (offset + start, offset + stop)}
        if "{expert}" not in stored.key:
            return part[keys[0]].read(keys[0], cuts)
        below = {dim - 1: cut for dim, cut in cuts.items()}
        return torch.stack([part[key].read(key, below) for key in keys])

    def _stored(self, name: str) -> Stored:
        """Where the tensor lies in these files: the first of the family's places that is there, else the first of all."""
        general = generalised(name)
        if self.hf:
            places = FAMILIES[self.config.family].names[general]
        else:  # under our own name, or a matrix per expert, as Mistral writes them
            places = (Stored(general), Stored(general.replace("experts.", "experts.{expert}.")))
        return next(
            (place for place in places if self._keys(place, name)[0] in self.parts[0]), places[0]
        )

    def _places(self, name: str) -> list[str]:
        return self._keys(self._stored(name), name)

    def _keys(self, stored: Stored, name: str) -> list[str]:
        """The file's key of a tensor, or one for each expert."""
        experts = range(self.config.n_experts) if "{expert}" in stored.key else [0]
        return [stored.key.format(layer_of(name), expert=expert) for expert in experts]

    def _shard_spec(self, name: str) -> TensorSpec:
        """How these shards cut a tensor: as the table says, but Llama 3 cuts its embedding along the vocabulary."""
        spec, n = self.table[name], len(self.parts)
        if name == "tok_embeddings.weight" and name in self.parts[0]:
            found = self.parts[0][name].shape(name)
            choices = (spec, TensorSpec(spec.shape, 0), TensorSpec(spec.shape, 1))
            return next((choice for choice in choices if choice.local_shape(n) == found), spec)
        return spec

    def _settle(self, config: ModelConfig) -> ModelConfig:
        """Let the tensors decide what the config leaves open: the vocabulary of a `params.json` that says −1."""
        output = self.parts[0].get("output.weight")
        if config.vocab_size == -1 and output is not None:
            config = replace(config, vocab_size=output.shape("output.weight")[0] * len(self.parts))
        if config.vocab_size == -1:
            raise UserError(
                f"{self.folder}: vocab_size is -1 and there is no output.weight to take it from"
            )
        return config

    def _check(self) -> None:
        """Every tensor there, of the right shape, and no other, in every shard; all problems in one message."""
        n, problems = len(self.parts), []
        computed = set(COMPUTED)
        wanted = {key: shape for name in self.table for key, shape in self._expected(name)}
        if self.config.tie_word_embeddings:  # the embedding again, in files that spell the tie out
            computed.add("lm_head.weight" if self.hf else "output.weight")
        for number, part in enumerate(self.parts):
            where = f"shard {number} of {n}: " if n > 1 else ""
            for key, expected in wanted.items():
                if key not in part:
                    problems.append(f"{where}{key} is missing")
                    continue
                found = part[key].shape(key)
                kind, first = part[key].dtype(key), self.parts[0].get(key, part[key]).dtype(key)
                if kind is None or kind != first:
                    found_kind, expected_kind = (
                        kind or "no fp32, bf16 or fp16",
                        first or "one of them",
                    )
                    problems.append(
                        f"{where}{part[key].path.name}: {key} is {found_kind}, expected {expected_kind}"
                    )
                if found != expected:
                    problems.append(
                        f"{where}{part[key].path.name}: {key} has shape {list(found)}, expected {list(expected)}"
                    )
            if not problems:  # the embedding is there, and can be read
                problems += [f"{where}{problem}" for problem in self._untied(number, part)]
            for key in part.keys() - wanted.keys():
                if generalised(key) not in computed:
                    problems.append(f"{where}{part[key].path.name}: unknown tensor {key}")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise UserError(
                f"{self.folder} does not hold the model its config describes: {'; '.join(problems[:5])}{more}"
            )

    def _untied(self, number: int, part: dict[str, TensorFile]) -> list[str]:
        """What is wrong with an output layer that the file holds beside an embedding that is said to be the same."""
        key, n, found = "lm_head.weight" if self.hf else "output.weight", len(self.parts), []
        if not self.config.tie_word_embeddings or key not in part or self.config.head != "lm":
            return found
        spec = TensorSpec((self.config.vocab_size, self.config.dim), 0)
        shape, expected = part[key].shape(key), spec.local_shape(n)
        if shape != expected:
            return [
                f"{part[key].path.name}: {key} has shape {list(shape)}, expected {list(expected)}"
            ]
        start, stop = spec.local_range(number, n)
        for row in sorted(
            {start + i * (stop - start) // 16 for i in range(16)} if stop > start else ()
        ):  # a few of them tell
            theirs = part[key].read(key, {0: (row - start, row - start + 1)})
            if not torch.equal(theirs, self.read("tok_embeddings.weight", 0, row, row + 1)):
                return [
                    f"{part[key].path.name}: {key} is not the embedding, as tie_word_embeddings says it is; set that to false"
                ]
        return found

    def _expected(self, name: str) -> list[tuple[str, tuple[int, ...]]]:
        """The keys of a tensor in each shard, and the shape that each should have there."""
        stored, n = self._stored(name), len(self.parts)
        shape = list(self._shard_spec(name).local_shape(n) if n > 1 else self.table[name].shape)
        shape[stored.dim] *= stored.parts
        return [
            (key, tuple(shape[1:] if "{expert}" in stored.key else shape))
            for key in self._places(name)
        ]


def _consolidated(folder: Path) -> list[Path]:
    """Meta's shards in order. Raises UserError when one of the row is missing."""
    found = {}
    for path in folder.glob("consolidated*"):
        match = re.fullmatch(r"consolidated(?:\.(\d+))?\.(pth|safetensors)", path.name)
        if match:
            number = int(match[1] or 0)
            if number in found:
                raise UserError(
                    f"{folder}: {found[number].name} and {path.name} are both shard {number}; remove one"
                )
            found[number] = path
    holes = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if holes:
        names = ", ".join(f"consolidated.{i:02d}.pth" for i in holes)
        raise UserError(
            f"{folder}: {names} missing; shards up to consolidated.{max(found):02d} are there"
        )
    return [found[i] for i in sorted(found)]


def _hf_files(folder: Path) -> dict[str, TensorFile]:
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            located = indexed_files(folder, index)
            opened = {path: TensorFile(path) for path in sorted(set(located.values()))}
            for key, path in located.items():
                if key not in opened[path].keys:
                    raise UserError(
                        f"{index}: {key} is said to lie in {path.name}, which does not hold it"
                    )
            return {key: opened[path] for key, path in located.items()}
    for file in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        if file.is_file():
            opened = TensorFile(file)
            return dict.fromkeys(opened.keys, opened)
    raise UserError(
        f"{folder}: no checkpoint in it; expected consolidated.00.pth …, model.safetensors, pytorch_model.bin or their index"
    )


def read_config(path: str | Path) -> ModelConfig:
    """The sizes in a `params.json` or `config.json`, by whichever it is. Raises UserError."""
    raw = read_json(Path(path))
    config = (config_from_params if "dim" in raw else config_from_hf)(raw, str(path))
    family = FAMILIES.get(config.family)
    if family is None:
        raise UserError(f"{path}: unknown family {config.family!r}; one of {', '.join(FAMILIES)}")
    nameless = [name for name in layer_table(config) if f"layers.{{}}.{name}" not in family.names]
    unlike = [
        f"{field} {getattr(config, field)}"
        for field, value in family.has.items()
        if getattr(config, field) != value
    ]
    if nameless or unlike or (config.sliding_window and family.windows == "never"):
        what = (
            nameless[:1]
            + unlike
            + [f"sliding_window {config.sliding_window}"] * (family.windows == "never")
        )
        raise UserError(
            f"{path}: a model of family {config.family} has no {what[0]}; another family, or another value, is right"
        )
    return config


def _config(folder: Path, config_file: str | None) -> ModelConfig:
    """From the named file, else from the folder's `params.json` or `config.json`."""
    candidates = (
        [Path(config_file)] if config_file else [folder / "params.json", folder / "config.json"]
    )
    for path in candidates:
        if path.is_file():
            return read_config(path)
    raise UserError(
        f"{' and '.join(str(path) for path in candidates)}: not there; give the model's sizes by --config_file"
    )


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
        raise UserError(
            f"--model_type {model_type} disagrees with the checkpoint: {', '.join(wrong)}; leave the flag out"
        )


def adapter_on(base: Checkpoint, path: str) -> Adapter:
    """The adapter that lies in a folder, or in `adapter` below it beside the weights it was trained to, for the trunk of `base`.

    Raises UserError when there is none, or when it was trained on another trunk.
    """
    folder = Path(path)
    inner = folder / "adapter"
    if not inner.is_dir():
        if not (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{path}: holds no adapter; --shared_trunk needs one that was trained (--lora_rank) on the actor's weights"
            )
        return Adapter.open(path, base.config)
    adapter = Adapter.open(str(inner), base.config)
    trained = Checkpoint.open(path)
    stem = next(name for name in adapter.tensors).removesuffix(".lora_a")
    for name in ("norm.weight", f"{stem}.weight"):
        shape = base.table[name].shape
        if trained.table[name].shape != shape:
            raise UserError(
                f"{path}: {name} is {list(trained.table[name].shape)}, the actor's {list(shape)}: another model's adapter"
            )
        want = adapter.added_to(base.read(name).float(), name, None, 0, 0)
        have = trained.read(name).float()
        if (
            (want - have).abs().max() > 0.02 * want.abs().max()
        ):  # the weights are rounded once more when they are saved
            raise UserError(
                f"{path}: its adapter was trained on other weights than {base.folder}'s ({name} differs); train it on these"
            )
    return adapter
