"""A checkpoint of any format, cut for any degree, seen as whole tensors in Meta's names.

Any slice of them can be read, and everything else follows from that: loading a rank reads its
slices, splitting reads each rank's, merging reads them whole. So any format loads at any degree,
and nothing holds more than one shard.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import reduce
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint.adapter import ADAPTER_CONFIG, Adapter
from src.checkpoint.files import SUFFIXES, TensorFile, indexed_files
from src.checkpoint.gguf import GGUFFile
from src.checkpoint.json_file import read_json
from src.checkpoint.names import (
    Spelling,
    generalised,
    is_computed,
    is_rotary,
    layer_of,
    module_of,
    naming_of,
    quantised_by,
    spelled,
    to_interleaved,
    unwrapped,
)
from src.checkpoint.rope import one_rope
from src.checkpoint.shards import FIX, Place, brief, check_stages, shard_files, stages_of
from src.errors import UserError
from src.models.config import SIZES, ModelConfig, config_from_params, described
from src.models.family import Stored
from src.models.hf_config import FAMILIES, PRESETS, config_from_hf
from src.models.layout import TensorSpec, layer_table, tensor_table


@dataclass(frozen=True)
class Located:
    """A tensor of a file, under the file's own key."""

    file: TensorFile | GGUFFile
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.key)

    @property
    def dtype(self) -> torch.dtype | None:
        return self.file.dtype(self.key)

    @property
    def dtype_name(self) -> str:
        return self.file.dtype_name(self.key)

    def read(self, cuts: dict[int, tuple[int, int]] | None = None) -> Tensor:
        return self.file.read(self.key, cuts)

    def __str__(self) -> str:
        return f"{self.file.path.name}: {self.key}"


Part = dict[str, Located]  # where each tensor of a shard lies, by the name in a whole, plain model


class Checkpoint:
    """Open with `Checkpoint.open`.

    `config`: the sizes; `table`: name → TensorSpec of every weight in it; `spelling`: how its files
    call the tensors; `gguf`: the file, where it is one; `stages`: in how many its shards are cut.
    """

    def __init__(
        self, folder: Path, config: ModelConfig, parts: list[Part], spelling: Spelling
    ) -> None:
        """parts: one for each shard; Hugging Face's have one, however many files it lies in."""
        self.folder, self.parts, self.spelling = folder, parts, spelling
        self.naming = naming_of(parts[0])
        self.adapter: Adapter | None = None
        self.config = config
        self.config = self._settle()
        self.table = tensor_table(self.config)
        file = next(iter(parts[0].values())).file if parts[0] else None
        self.gguf = file if isinstance(file, GGUFFile) else None
        self.stages = 1 if file is None else stages_of(file.path)
        self._check()

    @classmethod
    def open(
        cls,
        path: str,
        config_file: str | None = None,
        adapter_dir: str | None = None,
        gguf: bool = False,
        alone: bool = False,
    ) -> "Checkpoint":
        """path: a Hugging Face folder, a folder of consolidated shards, or one tensor file.

        adapter_dir: a folder in PEFT's format, whose adapter is added to every weight that is read;
        gguf: whether the one file may be GGUF, which has its tokenizer inside; alone: whether an
        adapter that lies in the folder is knowingly left out. Raises UserError for what is not
        there or does not fit.
        """
        if Path(path).suffix == ".gguf" and not gguf:
            raise UserError(
                f"{path}: a GGUF file is unpacked first, with its tokenizer: "
                f"python checkpoint_split.py --ckpt_file {path} --save_path DIR --n 1"
            )
        try:
            checkpoint = cls._open(Path(path), config_file)
            if adapter_dir is None and not alone and (Path(path) / ADAPTER_CONFIG).is_file():
                raise UserError(
                    f"{path}: also holds an adapter ({ADAPTER_CONFIG}), which transformers would "
                    f"add to the weights; give --adapter_dir {path} to do so, or remove it"
                )
            if adapter_dir is not None:
                checkpoint.adapter = Adapter.open(adapter_dir, checkpoint.config)
                # its added tokens and its score head are the model's
                checkpoint.config = checkpoint.adapter.applied_to(checkpoint.config)
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
        if path.suffix == ".gguf" and not path.is_dir():
            file = GGUFFile(path)
            spelling = spelled(file.keys)
            config = read_config(config_file) if config_file else config_of(file.hf_config, path)
            return cls(path, config, [_located(file)], spelling)
        folder = path if path.is_dir() else path.parent
        files = shard_files(folder) if path.is_dir() else {Place(): path}
        beside = _hf_files(folder) if path.is_dir() else {}
        if path.is_dir() and not files:
            if not beside:
                raise UserError(_nothing_in(folder))
            found, beside = [beside], {}
        elif not path.is_dir() and path.suffix not in SUFFIXES:
            raise UserError(
                f"{path}: unknown kind of file; expected a folder or one of "
                f"{', '.join((*SUFFIXES, '.gguf'))}"
            )
        elif not path.is_dir() and stages_of(path) > 1:
            raise UserError(f"{path}: holds one stage's layers alone; give {folder}, with all")
        else:
            found = _joined(folder, files)
        checkpoint = cls._of(folder, _config(folder, config_file), found)
        if beside:
            checkpoint._check_beside(beside, config_file)
        return checkpoint

    @classmethod
    def _of(cls, folder: Path, config: ModelConfig, found: list[Part]) -> "Checkpoint":
        """found: the tensors of each shard, by the files' own keys."""
        spellings = [spelled(part) for part in found]
        parts = [
            {name: part[key] for name, key in spelling.keys.items()}
            for part, spelling in zip(found, spellings)
        ]
        return cls(folder, config, parts, spellings[0])

    def release(self) -> None:
        """Let go of the files' pages; what is read later opens them again."""
        files = {id(x.file): x.file for part in self.parts for x in part.values()}
        for file in files.values():
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
    def adapter_folder(self) -> Path | None:
        """Where its adapter lies, if it has one."""
        return None if self.adapter is None else self.adapter.folder

    @property
    def dtype(self) -> torch.dtype:
        """The matrices'; where they differ, the narrowest that holds the numbers of all of them.

        Of norms and biases some savers keep other dtypes, wider or narrower.
        """
        matrices = [name for name, spec in self.table.items() if len(spec.shape) > 1]
        keys = {key for name in matrices for key in self._places(name)} & self.parts[0].keys()
        found = {dtype for key in keys if (dtype := self.parts[0][key].dtype) is not None}
        return reduce(torch.promote_types, found)

    def dtype_of(self, name: str) -> torch.dtype:
        """A tensor's own; the model's for one that is in none of the files."""
        key = self._places(name)[0]
        if key not in self.parts[0]:  # an adapter's score head, or one that is new
            return self.dtype
        dtype = self.parts[0][key].dtype
        assert dtype is not None, f"{key}: `_check` lets no other dtype in"
        return dtype

    def bytes_of(self, name: str, dtype: torch.dtype | None = None) -> int:
        """Bytes of a whole tensor, in its own dtype or another."""
        itemsize = (dtype or self.dtype_of(name)).itemsize
        return torch.Size(self.table[name].shape).numel() * itemsize

    def read(
        self, name: str, dim: int | None = None, start: int = 0, stop: int = 0, merged: bool = True
    ) -> Tensor:
        """A tensor in Meta's name and row order, whole or its [start, stop) along `dim`.

        merged: with the adapter's part, where there is an adapter.
        """
        if self.adapter and name in self.adapter.replaced:
            whole = self.adapter.replaced[name].to(self.dtype_of(name))
            return whole if dim is None else whole.narrow(dim, start, stop - start)
        cuts = {} if dim is None else {dim: (start, stop)}
        if len(self.parts) > 1 and self._shard_spec(name).dim is not None:
            tensor = self._read_shards(name, cuts)
        else:
            tensor = self._read_part(self.parts[0], name, cuts, self.table[name].shape)
        if is_rotary(name) and self.naming.halves(self.config):
            # Rows move within a head only, and cuts fall between heads: a slice can do it alone.
            if dim == 1:
                raise ValueError(f"{name} is cut along its heads, not along dim 1")
            tensor = to_interleaved(tensor, self.config.head_dim)
        if self.adapter:
            tensor = self.adapter.in_place(tensor, name, dim, start, stop)
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
        part: Part,
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
            return part[keys[0]].read(cuts)
        # A matrix per expert, [out, in], is an axis short of ours, [experts, out, in].
        matrix_cuts = {dim - 1: cut for dim, cut in cuts.items()}
        return torch.stack([part[key].read(matrix_cuts) for key in keys])

    def _stored(self, name: str) -> Stored:
        """Where the tensor lies: the first of its places in these files, else of all."""
        if name == "output.weight" and self.naming.output not in self.parts[0]:
            # an adapter has its own embedding or output layer: a tie in the base is undone
            name = "tok_embeddings.weight" if self.adapter else name
        places = self.naming.places(generalised(name), self.config)
        return next(
            (place for place in places if self._keys(place, name)[0] in self.parts[0]), places[0]
        )

    def _places(self, name: str) -> list[str]:
        return self._keys(self._stored(name), name)

    def _keys(self, stored: Stored, name: str) -> list[str]:
        """The key of a tensor, by a plain model's names, or one for each expert."""
        experts = range(self.config.n_experts) if "{expert}" in stored.key else [0]
        return [stored.key.format(layer_of(name), expert=expert) for expert in experts]

    def _shard_spec(self, name: str) -> TensorSpec:
        """How these shards cut a tensor: as the table says, but for the embedding.

        Llama 3 cuts it along the vocabulary, Llama 1 and 2 along its width: its shape tells.
        """
        spec, n = self.table[name], len(self.parts)
        if name == "tok_embeddings.weight" and name in self.parts[0]:
            shape = self.parts[0][name].shape
            choices = (spec, TensorSpec(spec.shape, 0), TensorSpec(spec.shape, 1))
            return next((choice for choice in choices if choice.local_shape(n) == shape), spec)
        return spec

    def _settle(self) -> ModelConfig:
        """What a config leaves open, and the tensors decide.

        The vocabulary, where a `params.json` says −1; and that there is no output layer, in what
        was saved of a trunk alone.
        """
        config, outputs = self.config, [part.get(self.naming.output) for part in self.parts]
        if config.vocab_size == -1 and outputs[0] is not None:
            config = replace(config, vocab_size=outputs[0].shape[0] * len(self.parts))
        if config.vocab_size == -1:
            raise UserError(
                f"{self.folder}: vocab_size is -1 and there is no output.weight to take it from"
            )
        if config.head == "none" and any(outputs):
            return config.with_head("lm")
        if config.head == "lm" and self.spelling.dropped and not any(outputs):
            lacking = [n for n in tensor_table(config) if self._places(n)[0] not in self.parts[0]]
            if lacking == ["output.weight"]:
                return config.with_head("none")
        return config

    def _check(self) -> None:
        """Raise UserError unless every shard holds every tensor, in its shape, and no other.

        All problems are in one message, by the files' own keys.
        """
        self._check_kind()
        self._check_stages()
        n, key_of = len(self.parts), self.spelling.of
        wrong: list[str] = []
        missing: list[tuple[str, str]] = []  # what to say before it, and the key
        unknown: list[tuple[str, Located]] = []
        wanted = {key: shape for name in self.table for key, shape in self._expected(name)}
        for number, part in enumerate(self.parts):
            shard = f"shard {number} of {n}: " if n > 1 else ""
            for key, expected in wanted.items():
                if key not in part:
                    missing.append((shard, key_of(key)))
                    continue
                found, first = part[key], self.parts[0].get(key, part[key])
                if found.dtype is None or found.dtype != first.dtype:
                    kind = found.dtype or f"{found.dtype_name}, no fp32, bf16 or fp16"
                    wrong.append(
                        f"{shard}{found} is {kind}, expected {first.dtype or 'one of them'}"
                    )
                if found.shape != expected:
                    wrong.append(
                        f"{shard}{found} has shape {list(found.shape)}, expected {list(expected)}"
                    )
            if not wrong and not missing:  # the embedding is there, and can be read
                wrong += [f"{shard}{problem}" for problem in self._untied(number, part)]
            tied = {self.naming.output} if self.config.tie_word_embeddings else set()
            for key in sorted(part.keys() - wanted.keys() - tied):
                if not is_computed(key):
                    unknown.append((shard, part[key]))
        count = len(wrong) + len(missing) + len(unknown)
        if not count:
            return
        strangers = [found.key for _, found in unknown]
        output = key_of(self.naming.output)
        advice = {output: "; if that is the embedding, set tie_word_embeddings to true"}
        lines = [
            wrong[:5],
            [
                f"{shard}{key} is missing{_nearest(key, strangers) or advice.get(key, '')}"
                for shard, key in missing[:5]
            ],
            [
                f"{shard}{found.file.path.name}: unknown tensor {found.key}"
                for shard, found in unknown[:5]
            ],
        ]
        # some of each kind: what is missing and what is unknown explain each other
        shown = [line for group in zip_longest(*lines) for line in group if line][:5]
        more = f" (and {count - len(shown)} more)" if count > len(shown) else ""
        read = f" ({self.spelling.described})" if self.spelling.described else ""
        fix = f"; {FIX}" if self.stages > 1 else ""
        raise UserError(
            f"{self.folder} does not hold the model its config describes{read}: "
            f"{'; '.join(shown)}{more}{fix}"
        )

    def _check_kind(self) -> None:
        """Raise UserError for files of another kind, in a line that says what they are."""
        for found in self.parts[0].values():
            who = quantised_by(found.key)
            if who:
                raise UserError(
                    f"{found}: these weights are quantised ({who}), which is not supported: load "
                    "the original ones, with --quantize if need be"
                )
            if ".lora_" in found.key or ".base_layer." in found.key:
                raise UserError(
                    f"{found}: an adapter lies among the weights; save the model with it added in "
                    "(merge_and_unload), or the adapter alone, for --adapter_dir"
                )

    def _check_stages(self) -> None:
        """Raise UserError for a layer, or another module, that none of several stages holds."""
        if self.stages == 1:
            return
        held = {
            module_of(name)
            for name in self.table
            if any(self._places(name)[0] in part for part in self.parts)
        }
        holes = [m for m in dict.fromkeys(map(module_of, self.table)) if m not in held]
        if holes:
            raise UserError(
                f"{self.folder}: none of its {self.stages} stages holds {brief(holes)}, which its "
                f"config describes; {FIX}"
            )

    def _check_beside(self, beside: Part, config_file: str | None) -> None:
        """Raise UserError unless Hugging Face's files beside these shards hold the same weights.

        So a folder that both were released in can be read by either, and one where a base's shards
        were left beside what was trained since is told. beside: by the files' own keys.
        """
        first, second = (_file_names(part) for part in (self.parts[0], beside))
        both = f"{self.folder}: {first} and {second} both lie there and hold different weights"
        remove = "remove what is not meant"
        config_json = self.folder / "config.json"
        config = self.config
        if config_file is None and config_json.is_file():
            config = read_config(config_json)
        try:
            other = Checkpoint._of(self.folder, config, [beside])
        except UserError as error:
            raise UserError(f"{both} ({error}); {remove}") from None
        # of a tie either may have the output layer, too
        tied = {"output.weight"} if config.tie_word_embeddings else set()
        strangers = sorted((self.table.keys() ^ other.table.keys()) - tied)
        if strangers:
            raise UserError(f"{both} (only one of them has {strangers[0]}); {remove}")
        for name in self.table:
            its_name = name if name in other.table else "tok_embeddings.weight"
            spec, its_spec = self.table[name], other.table[its_name]
            if spec.shape != its_spec.shape:
                shapes = f"{list(spec.shape)} and {list(its_spec.shape)}"
                raise UserError(f"{both} ({name}: {shapes}); {remove}")
            # Experts' rows are the second dim's; what is rotated is reordered within its head.
            dim = max(len(spec.shape) - 2, 0)
            unit = self.config.head_dim if is_rotary(name) else 1
            row_bytes = self.bytes_of(name) // spec.shape[dim]
            for start, stop in _compared(name, spec.shape[dim], row_bytes, unit):
                rows = self.read(name, dim, start, stop)
                if not _alike(rows, other.read(its_name, dim, start, stop)):
                    raise UserError(f"{both} ({name}, rows {start} to {stop - 1}); {remove}")
        other.release()

    def _untied(self, number: int, part: Part) -> list[str]:
        """What is wrong with an output layer in the file that is said to be the embedding."""
        key, n = self.naming.output, len(self.parts)
        if not self.config.tie_word_embeddings or key not in part or self.config.head != "lm":
            return []
        spec = TensorSpec((self.config.vocab_size, self.config.dim), 0)
        found, expected = part[key], spec.local_shape(n)
        if found.shape != expected:
            return [f"{found} has shape {list(found.shape)}, expected {list(expected)}"]
        # All rows of the shard's part, since some tokens' alone may have been trained.
        first, last = spec.local_range(number, n)
        row_bytes = self.bytes_of("tok_embeddings.weight") // self.config.vocab_size
        for start, stop in _compared("output.weight", last - first, row_bytes):
            rows = found.read({0: (start, stop)}).float()
            embedded = self.read("tok_embeddings.weight", 0, first + start, first + stop).float()
            if not torch.equal(rows, embedded):
                row = first + start + int((rows != embedded).any(1).nonzero()[0])
                return [
                    f"{found} is not the embedding (row {row} differs), as tie_word_embeddings "
                    "says it is; set that to false to keep both"
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


def _nearest(key: str, others: list[str]) -> str:
    """In words, the key that one that is missing may be meant by."""
    near = get_close_matches(key, others, 1, 0.8)
    return f" (nearest there: {near[0]})" if near else ""


def _located(file: TensorFile | GGUFFile) -> Part:
    return {key: Located(file, key) for key in file.keys}


def _joined(folder: Path, paths: dict[Place, Path]) -> list[Part]:
    """Each shard's tensors, by the files' own keys, from its file of every stage.

    Raises UserError when stages do not fit each other.
    """
    files = {place: TensorFile(path) for place, path in paths.items()}
    if max(files).stages > 1:
        check_stages(folder, files)
    parts: list[Part] = [{} for _ in range(1 + max(files).rank)]
    for place, file in files.items():
        parts[place.rank] |= _located(file)
    return parts


# What training changes of these, it may change in single rows: a token's.
_BY_TOKENS = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|tok_embeddings|output)\.weight$")
_SMALL = 2**20  # bytes of a tensor that is compared whole in any case
_AT_ONCE = 2**24  # bytes of it that are read at a time
_SAMPLES = 16  # so many rows of a larger one


def _compared(name: str, rows: int, row_bytes: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Which rows [start, stop) of two copies of a tensor are compared, cut at multiples of `unit`.

    All of the vocabulary's and of small ones. Two copies of a 70B are 280 GB: of others it is some
    rows spread evenly, the first and the last among them, since what is trained of a matrix changes
    nearly every row.
    """
    if _BY_TOKENS.search(unwrapped(name)) or rows * row_bytes <= _SMALL:
        step = max(_AT_ONCE // max(row_bytes, 1) // unit, 1) * unit
        yield from ((start, min(start + step, rows)) for start in range(0, rows, step))
        return
    last = rows // unit - 1
    samples = min(_SAMPLES if unit == 1 else 3, last + 1)  # a few heads are as many bytes
    for i in range(samples):
        start = unit * (last * i // max(samples - 1, 1))
        yield start, start + unit


def _cuts_of(key: str, located: Located) -> Iterator[dict[int, tuple[int, int]]]:
    """What is compared of a tensor in a file, as cuts to read it by."""
    if not located.shape:
        yield {}
        return
    dim = max(len(located.shape) - 2, 0)  # of experts in one tensor, a row of each
    itemsize = (located.dtype or torch.float32).itemsize
    row_bytes = itemsize * torch.Size((*located.shape[:dim], *located.shape[dim + 1 :])).numel()
    for rows in _compared(key, located.shape[dim], row_bytes):
        yield {dim: rows}


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two copies hold the same numbers, or one holds the other's, rounded to its dtype."""
    return torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype))


def _file_names(part: Part) -> str:
    """In words, the files that tensors lie in."""
    names = sorted({located.file.path.name for located in part.values()})
    return names[0] if len(names) == 1 else f"{names[0]} …"


def _nothing_in(folder: Path) -> str:
    """What a folder lacks that has no tensors."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        return (
            f"{folder}: no checkpoint in it, but an adapter; give the model that it was trained on "
            f"({base}) in its place, and --adapter_dir {folder}"
        )
    indices = [f"{stem}.index.json" for stem in _HF_STEMS]
    gone = [f"the files of {i} are missing from it" for i in indices if (folder / i).is_file()]
    expected = "expected consolidated.00.pth …, model.safetensors, pytorch_model.bin or their index"
    return f"{folder}: no checkpoint in it; {'; '.join(gone) or expected}"


_HF_STEMS = ("model.safetensors", "pytorch_model.bin")


def _hf_files(folder: Path) -> Part:
    """Where the tensors of a Hugging Face folder lie; {} where it has none.

    As transformers does it: a whole file before an index, safetensors before torch's. An index
    whose files are all gone is left over from another save.
    """
    for stem in _HF_STEMS:
        whole, index = folder / stem, folder / f"{stem}.index.json"
        single = _located(TensorFile(whole)) if whole.is_file() else None
        sharded = _indexed(folder, index) if index.is_file() else None
        if single and sharded:
            _check_alike(single, sharded, whole, index)
        if single or sharded:
            return single or sharded or {}
    return {}


def _indexed(folder: Path, index: Path) -> Part | None:
    """The tensors of an index's files, all that these hold; None when none of them is there.

    Of two files with the same tensor the index names the one that counts.
    """
    named = indexed_files(folder, index)
    files = sorted(set(named.values()))
    missing = [path.name for path in files if not path.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        key = next(key for key, path in named.items() if path.name == missing[0])
        raise UserError(f"{index}: {key} lies in {missing[0]}, which is missing from {folder}")
    opened = {path: _located(TensorFile(path)) for path in files}
    found = {key: located for part in opened.values() for key, located in part.items()}
    return found | {key: opened[path][key] for key, path in named.items() if key in opened[path]}


def _check_alike(single: Part, sharded: Part, whole: Path, index: Path) -> None:
    """Raise UserError when a whole file and an index's files beside it hold different weights.

    transformers reads the former, whichever was saved last.
    """
    for key in sorted(single.keys() | sharded.keys()):
        a, b = single.get(key), sharded.get(key)
        alike = a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype
        if a is not None and b is not None and alike and a.file.path != b.file.path:
            alike = all(torch.equal(a.read(cuts), b.read(cuts)) for cuts in _cuts_of(key, a))
        if not alike:
            raise UserError(
                f"{whole.parent}: {whole.name} and the files of {index.name} hold different "
                f"weights ({key}); remove what is not meant"
            )


def read_config(path: str | Path) -> ModelConfig:
    """The sizes in a `params.json` or `config.json`, by whichever it is. Raises UserError."""
    return config_of(read_json(Path(path)), path)


def config_of(raw: dict, path: str | Path) -> ModelConfig:
    """The sizes that a `params.json` or `config.json` holds; path: what it was read from."""
    if "dim" in raw:
        config = config_from_params(raw, str(path))
    else:
        config = config_from_hf(one_rope(raw, str(path)), str(path))
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
    """From the named file, else from the folder's `params.json` or `config.json`.

    Where both are there, they must describe the same model.
    """
    candidates = (
        [Path(config_file)] if config_file else [folder / "params.json", folder / "config.json"]
    )
    there = [path for path in candidates if path.is_file()]
    if len(there) == 2:
        _check_same_sizes(*there)
    if there:
        return read_config(there[0])
    raise UserError(
        f"{' and '.join(str(path) for path in candidates)}: not there; "
        "give the model's sizes by --config_file"
    )


# What Meta's and Mistral's files do not say, nor need to: it is compared where they do.
_LEFT_OUT = {"tie_word_embeddings", "head", "family", "router_aux_loss_coef"}


def _check_same_sizes(params_file: Path, config_file: Path) -> None:
    """Raise UserError unless two descriptions are of models that compute the same."""
    said = read_json(params_file).keys()
    params, config = read_config(params_file), read_config(config_file)
    names = {field.name for field in described()} - (_LEFT_OUT - said)
    if not params.use_logn_attn and not params.use_dynamic_ntk:
        names.discard("max_seq_len")  # nothing is computed by it
    if params.vocab_size == -1:  # the tensors tell
        names.discard("vocab_size")
    for name in sorted(names):
        ours, theirs = getattr(params, name), getattr(config, name)
        if ours != theirs:
            raise UserError(
                f"{params_file} and {config_file} describe different models: {name} is {ours} in "
                f"the one and {theirs} in the other; remove what is not meant, or name the right "
                "one by --config_file"
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
        if not (folder / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"{path}: holds no adapter; --shared_trunk needs one that was trained "
                "(--lora_rank) on the actor's weights"
            )
        return _of_factors_alone(Adapter.open(path, base.config))
    # The merged weights beside the adapter tell the trunk: base + adapter must come to them, but
    # for their being rounded once more when they were saved. Two tensors are enough.
    adapter = _of_factors_alone(Adapter.open(str(inner), base.config))
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


def _of_factors_alone(adapter: Adapter) -> Adapter:
    """Raise UserError for one that cannot be trained on beside others on the same weights."""
    if adapter.fixed:
        raise UserError(
            f"{adapter.folder}: {adapter.fixed}, which --shared_trunk does not support; "
            "give the model merged (checkpoint_merge.py), without --shared_trunk"
        )
    return adapter
