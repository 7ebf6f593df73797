"""A checkpoint of any format, cut for any degree, seen as whole tensors in Meta's names.

Any slice of them can be read, and everything else follows from that: loading a rank reads its
slices, splitting reads each rank's, merging reads them whole. So any format loads at any degree,
and nothing holds more than one shard.
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
    """Open with `Checkpoint.open`.

    `config`: the sizes; `table`: name → TensorSpec of every weight in it.
    """

    def __init__(
        self, folder: Path, config: ModelConfig, parts: list[dict[str, TensorFile]], hf: bool
    ) -> None:
        """parts: for each shard, which file holds each tensor (by the file's own names).

        Hugging Face's checkpoints have one part, however many files it lies in.
        """
        self.folder, self.parts, self.hf = folder, parts, hf
        self.config = self._settle(config)
        self.table = tensor_table(self.config)
        self.adapter: Adapter | None = None
        self._check()

    @classmethod
    def open(
        cls, path: str, config_file: str | None = None, adapter_dir: str | None = None
    ) -> "Checkpoint":
        """path: a Hugging Face folder, a folder of consolidated shards, or one tensor file.

        adapter_dir: a folder in PEFT's format, whose adapter is added to every weight that is read.
        Raises UserError for what is not there or does not fit.
        """
        try:
            checkpoint = cls._open(Path(path), config_file)
            if adapter_dir is not None:
                checkpoint.adapter = Adapter.open(adapter_dir, checkpoint.config)
                # a verifier's adapter makes a verifier of its base
                if checkpoint.adapter.score is not None:
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
        """The tensor, unless it holds NaN or infinity: then UserError."""
        # Its extremes tell, without a mask of its size.
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(
                f"{self.folder}: NaN or infinite weights in {name}; the checkpoint is damaged"
            )
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        """The last norm's, where tensors differ."""
        return self._dtype_of("norm.weight")

    def _dtype_of(self, name: str) -> torch.dtype:
        key = self._places(name)[0]
        dtype = self.parts[0][key].dtype(key)
        assert dtype is not None, f"{key}: `_check` lets no other dtype in"
        return dtype

    def bytes_of(self, name: str, dtype: torch.dtype | None = None) -> int:
        """Bytes of a whole tensor, in its own dtype or another."""
        if dtype is None:
            # an adapter's score head is in none of the files
            in_file = self._places(name)[0] in self.parts[0]
            dtype = self._dtype_of(name) if in_file else self.dtype
        return torch.Size(self.table[name].shape).numel() * dtype.itemsize

    def read(
        self, name: str, dim: int | None = None, start: int = 0, stop: int = 0, merged: bool = True
    ) -> Tensor:
        """A tensor in Meta's name and row order, whole or its [start, stop) along `dim`.

        merged: with the adapter's part, where there is an adapter.
        """
        if name == "score.weight" and self.adapter and self.adapter.score is not None:
            return self.adapter.score.to(self.dtype)
        cuts = {} if dim is None else {dim: (start, stop)}
        if len(self.parts) > 1 and self._shard_spec(name).dim is not None:
            tensor = self._read_shards(name, cuts)
        else:
            tensor = self._read_part(self.parts[0], name, cuts, self.table[name].shape)
        if self.hf and is_rotary(name):
            # Rows move within a head only, and cuts fall between heads: a slice can do it alone.
            if dim == 1:
                raise ValueError(f"{name} is cut along its heads, not along dim 1")
            tensor = to_interleaved(tensor, self.config.head_dim)
        if self.adapter and merged:
            tensor = self.adapter.added_to(tensor, name, dim, start, stop)
        return tensor

    def local(self, name: str, rank: int, n: int, merged: bool = True) -> Tensor:
        """The part of `name` that rank `rank` of `n` holds, with zeros behind it if it is short."""
        spec = self.table[name]
        if spec.dim is None:
            return self.read(name, merged=merged)
        return spec.padded(self.read(name, spec.dim, *spec.local_range(rank, n), merged), n)

    def _read_shards(self, name: str, cuts: dict[int, tuple[int, int]]) -> Tensor:
        """A tensor from several shards, joined along the axis that they cut.

        A cut along that axis reads the shards that it meets, a cut along another that much of all.
        """
        spec = self._shard_spec(name)
        axis, shape = spec.dim, spec.local_shape(len(self.parts))
        assert axis is not None, f"{name}: every shard holds all of it"
        start, stop = cuts.get(axis, (0, spec.shape[axis]))
        pieces = []
        for rank, first, last in spec.owners(len(self.parts)):
            low, high = max(start, first), min(stop, last)
            if low < high:
                local_cuts = {**cuts, axis: (low - first, high - first)}
                pieces.append(self._read_part(self.parts[rank], name, local_cuts, shape))
        if not pieces:  # an empty range: a rank whose part is all padding
            return self._read_part(self.parts[0], name, {**cuts, axis: (0, 0)}, shape)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)

    def _read_part(
        self,
        part: dict[str, TensorFile],
        name: str,
        cuts: dict[int, tuple[int, int]],
        shape: tuple[int, ...],
    ) -> Tensor:
        """A tensor from one shard's files; `shape`: the tensor's in this shard."""
        stored, keys = self._stored(name), self._places(name)
        if stored.parts > 1:  # the index-th part of a fused tensor
            start, stop = cuts.get(stored.dim, (0, shape[stored.dim]))
            offset = stored.index * shape[stored.dim]
            cuts = {**cuts, stored.dim: (offset + start, offset + stop)}
        if "{expert}" not in stored.key:
            return part[keys[0]].read(keys[0], cuts)
        # A matrix per expert, [out, in], is an axis short of ours, [experts, out, in].
        matrix_cuts = {dim - 1: cut for dim, cut in cuts.items()}
        return torch.stack([part[key].read(key, matrix_cuts) for key in keys])

    def _stored(self, name: str) -> Stored:
        """Where the tensor lies: the first of the family's places in these files, else of all."""
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
        """How these shards cut a tensor: as the table says, but for the embedding.

        Llama 3 cuts it along the vocabulary, Llama 1 and 2 along its width: its shape tells.
        """
        spec, n = self.table[name], len(self.parts)
        if name == "tok_embeddings.weight" and name in self.parts[0]:
            shape = self.parts[0][name].shape(name)
            choices = (spec, TensorSpec(spec.shape, 0), TensorSpec(spec.shape, 1))
            return next((choice for choice in choices if choice.local_shape(n) == shape), spec)
        return spec

    def _settle(self, config: ModelConfig) -> ModelConfig:
        """Let the tensors decide the vocabulary, which a `params.json` leaves open by saying −1."""
        output = self.parts[0].get("output.weight")
        if config.vocab_size == -1 and output is not None:
            config = replace(config, vocab_size=output.shape("output.weight")[0] * len(self.parts))
        if config.vocab_size == -1:
            raise UserError(
                f"{self.folder}: vocab_size is -1 and there is no output.weight to take it from"
            )
        return config

    def _check(self) -> None:
        """Raise UserError unless every shard holds every tensor, in its shape, and no other.

        All problems are in one message.
        """
        n = len(self.parts)
        problems: list[str] = []
        computed = set(COMPUTED)
        wanted = {key: shape for name in self.table for key, shape in self._expected(name)}
        if self.config.tie_word_embeddings:  # the embedding again, in files that spell the tie out
            computed.add("lm_head.weight" if self.hf else "output.weight")
        for number, part in enumerate(self.parts):
            shard = f"shard {number} of {n}: " if n > 1 else ""
            for key, expected in wanted.items():
                if key not in part:
                    problems.append(f"{shard}{key} is missing")
                    continue
                shape, dtype = part[key].shape(key), part[key].dtype(key)
                first_dtype = self.parts[0].get(key, part[key]).dtype(key)
                if dtype is None or dtype != first_dtype:
                    problems.append(
                        f"{shard}{part[key].path.name}: {key} is "
                        f"{dtype or 'no fp32, bf16 or fp16'}, "
                        f"expected {first_dtype or 'one of them'}"
                    )
                if shape != expected:
                    problems.append(
                        f"{shard}{part[key].path.name}: {key} has shape {list(shape)}, "
                        f"expected {list(expected)}"
                    )
            if not problems:  # the embedding is there, and can be read
                problems += [f"{shard}{problem}" for problem in self._untied(number, part)]
            for key in part.keys() - wanted.keys():
                if generalised(key) not in computed:
                    problems.append(f"{shard}{part[key].path.name}: unknown tensor {key}")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise UserError(
                f"{self.folder} does not hold the model its config describes: "
                f"{'; '.join(problems[:5])}{more}"
            )

    def _untied(self, number: int, part: dict[str, TensorFile]) -> list[str]:
        """What is wrong with an output layer in the file that is said to be the embedding."""
        key, n = "lm_head.weight" if self.hf else "output.weight", len(self.parts)
        if not self.config.tie_word_embeddings or key not in part or self.config.head != "lm":
            return []
        spec = TensorSpec((self.config.vocab_size, self.config.dim), 0)
        shape, expected = part[key].shape(key), spec.local_shape(n)
        if shape != expected:
            return [
                f"{part[key].path.name}: {key} has shape {list(shape)}, expected {list(expected)}"
            ]
        # A few rows of the shard's part tell, without reading all of it.
        start, stop = spec.local_range(number, n)
        rows = {start + i * (stop - start) // 16 for i in range(16)} if stop > start else set()
        for row in sorted(rows):
            output_row = part[key].read(key, {0: (row - start, row - start + 1)})  # [1, dim]
            if not torch.equal(output_row, self.read("tok_embeddings.weight", 0, row, row + 1)):
                return [
                    f"{part[key].path.name}: {key} is not the embedding, "
                    "as tie_word_embeddings says it is; set that to false"
                ]
        return []

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
    shards: dict[int, Path] = {}
    for path in folder.glob("consolidated*"):
        match = re.fullmatch(r"consolidated(?:\.(\d+))?\.(pth|safetensors)", path.name)
        if match:
            number = int(match[1] or 0)
            if number in shards:
                raise UserError(
                    f"{folder}: {shards[number].name} and {path.name} are both shard {number}; "
                    "remove one"
                )
            shards[number] = path
    holes = sorted(set(range(max(shards, default=-1) + 1)) - shards.keys())
    if holes:
        names = ", ".join(f"consolidated.{i:02d}.pth" for i in holes)
        raise UserError(
            f"{folder}: {names} missing; shards up to consolidated.{max(shards):02d} are there"
        )
    return [shards[number] for number in sorted(shards)]


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
    for path in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        if path.is_file():
            file = TensorFile(path)
            return dict.fromkeys(file.keys, file)
    raise UserError(
        f"{folder}: no checkpoint in it; expected consolidated.00.pth …, model.safetensors, "
        "pytorch_model.bin or their index"
    )


def read_config(path: str | Path) -> ModelConfig:
    """The sizes in a `params.json` or `config.json`, by whichever it is. Raises UserError."""
    raw = read_json(Path(path))
    config = (config_from_params if "dim" in raw else config_from_hf)(raw, str(path))
    family = FAMILIES.get(config.family)
    if family is None:
        raise UserError(f"{path}: unknown family {config.family!r}; one of {', '.join(FAMILIES)}")
    # What the config describes must exist in its family: a tensor's name, fixed values, windows.
    nameless = [name for name in layer_table(config) if f"layers.{{}}.{name}" not in family.names]
    unlike = [
        f"{field} {getattr(config, field)}"
        for field, value in family.has.items()
        if getattr(config, field) != value
    ]
    if nameless or unlike or (config.sliding_window and family.windows == "never"):
        foreign = (
            nameless[:1]
            + unlike
            + [f"sliding_window {config.sliding_window}"] * (family.windows == "never")
        )
        raise UserError(
            f"{path}: a model of family {config.family} has no {foreign[0]}; "
            "another family, or another value, is right"
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
        f"{' and '.join(str(path) for path in candidates)}: not there; "
        "give the model's sizes by --config_file"
    )


def config_of_type(model_type: str | None, config_file: str | None) -> ModelConfig:
    """A model's sizes without a checkpoint: a config file's, or those of a --model_type.

    Raises UserError when there is neither, or they disagree.
    """
    if config_file is None:
        if model_type not in PRESETS:
            raise UserError(
                "--dry_run without a checkpoint needs --config_file, or a --model_type of "
                f"{', '.join(PRESETS)}"
            )
        return PRESETS[model_type]
    config = read_config(config_file)
    check_model_type(config, model_type)
    if config.vocab_size == -1:
        raise UserError(
            f"{config_file}: vocab_size is -1, which the tensors would tell; give the checkpoint"
        )
    return config


def check_model_type(config: ModelConfig, model_type: str | None) -> None:
    """Raise UserError when a `--model_type` is unknown or disagrees with the checkpoint's sizes."""
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
            f"--model_type {model_type} disagrees with the checkpoint: {', '.join(wrong)}; "
            "leave the flag out"
        )


def adapter_on(base: Checkpoint, path: str) -> Adapter:
    """The adapter that lies in a folder, for the trunk of `base`.

    It may also lie in `adapter` below, beside the weights with it added in. Raises UserError when
    there is none, or when it was trained on another trunk.
    """
    folder = Path(path)
    inner = folder / "adapter"
    if not inner.is_dir():
        if not (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{path}: holds no adapter; --shared_trunk needs one that was trained "
                "(--lora_rank) on the actor's weights"
            )
        return Adapter.open(path, base.config)
    # The merged weights beside the adapter tell the trunk: base + adapter must come to them, but
    # for their being rounded once more when they were saved. Two tensors are enough.
    adapter = Adapter.open(str(inner), base.config)
    trained = Checkpoint.open(path)
    stem = next(name for name in adapter.tensors).removesuffix(".lora_a")
    for name in ("norm.weight", f"{stem}.weight"):
        shape = base.table[name].shape
        if trained.table[name].shape != shape:
            raise UserError(
                f"{path}: {name} is {list(trained.table[name].shape)}, "
                f"the actor's {list(shape)}: another model's adapter"
            )
        expected = adapter.added_to(base.read(name).float(), name, None, 0, 0)
        saved = trained.read(name).float()
        if (expected - saved).abs().max() > 0.02 * expected.abs().max():
            raise UserError(
                f"{path}: its adapter was trained on other weights than {base.folder}'s "
                f"({name} differs); train it on these"
            )
    return adapter
