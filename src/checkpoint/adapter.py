"""LoRA adapters in PEFT's format, by Hugging Face's names.

A folder holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.checkpoint.files import TensorFile, save_tensors
from src.checkpoint.json_file import read_json
from src.checkpoint.names import (
    generalised,
    is_rotary,
    layer_of,
    to_halves,
    to_interleaved,
    unwrapped,
)
from src.errors import UserError
from src.models.config import ModelConfig, number
from src.models.family import Stored
from src.models.hf_config import FAMILIES, family_written
from src.models.layout import tensor_table
from src.models.lora import TARGETS, LoRAConfig, lora_table

ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# Settings of PEFT's that make another function of the same factors: refused when they are set.
_REFUSED = (
    "use_dora",
    "fan_in_fan_out",
    "target_parameters",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "megatron_config",
    "use_qalora",
    "use_bdlora",
)
_VOCABULARY = {"tok_embeddings.weight", "output.weight"}


@dataclass
class Adapter:
    """An adapter's factors, whole, in our names and row order, and the weights that go with them.

    `layers.0.attention.wq.lora_a` is [rank, in], `…lora_b` [out, rank]; experts' are stacked. Where
    ranks or scales differ, factors are as wide as the widest, with zeros, and B holds the scale.
    """

    folder: Path
    lora: LoRAConfig
    tensors: dict[str, Tensor]
    replaced: dict[str, Tensor] = field(default_factory=dict)  # whole weights in the base's place
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)  # trained tokens'
    tied: bool | None = None  # whether the output layer is still the embedding; None: as before
    fixed: str | None = None  # why it cannot be trained on

    @property
    def score(self) -> Tensor | None:
        """The scalar head trained with a verifier's adapter."""
        return self.replaced.get("score.weight")

    def applied_to(self, config: ModelConfig) -> ModelConfig:
        """The config of the base with the adapter: its head, its added tokens."""
        if self.tied is not None:
            config = replace(config, tie_word_embeddings=self.tied)
        if self.score is not None:
            config = replace(config, head="score", tie_word_embeddings=False)
        embedding = self.replaced.get("tok_embeddings.weight")
        return config if embedding is None else replace(config, vocab_size=len(embedding))

    @classmethod
    def open(cls, path: str, config: ModelConfig) -> "Adapter":
        """Read a folder for a model of this config.

        Raises UserError for what does not fit the model, or is not supported.
        """
        folder = Path(path)
        config_file = folder / ADAPTER_CONFIG
        if not config_file.is_file():
            raise UserError(
                f"{config_file}: not there; an adapter's folder holds it, "
                "beside adapter_model.safetensors"
            )
        raw = read_json(config_file)
        _check(raw, config_file)
        file = next(
            (
                folder / name
                for name in ("adapter_model.safetensors", "adapter_model.bin")
                if (folder / name).is_file()
            ),
            None,
        )
        if file is None:
            raise UserError(f"{folder}: no adapter_model.safetensors in it")
        tensors = _Tensors(TensorFile(file))
        replaced, rows = _weights(tensors, raw, config, config_file)
        layers: dict[str, list[_Layer]] = {}  # a layer for each expert, where there are any
        for stem in _stems(config):
            # Qwen v1 leaves here as a Qwen2 folder: its adapter may have either family's names.
            families = (family_written(config)[1], FAMILIES[config.family])
            places = [family.names[generalised(f"{stem}.weight")][0] for family in families]
            place = next(
                (p for p in places if f"{_module(p, stem, 0)}.lora_A.weight" in tensors), places[0]
            )
            modules = _modules(place, stem, config)
            if any(f"{module}.lora_{x}.weight" in tensors for module in modules for x in "AB"):
                layers[stem] = [
                    _layer(tensors, module, place, stem, config, raw, config_file)
                    for module in modules
                ]
            elif _is_targeted(raw, modules[0], config_file):
                raise UserError(f"{file}: has nothing for {modules[0]}, which target_modules names")
        # Nothing may be left over or lacking: an adapter read in part would be another adapter.
        if tensors.unread:
            raise UserError(
                f"{file}: {tensors.unread[0]} fits no layer of this model that can have an "
                f"adapter ({len(tensors.unread)} such tensors)"
            )
        if not layers:
            raise UserError(f"{file}: holds no adapter for this model")
        lora, factors, fixed = _even(layers, config, float(raw.get("lora_dropout") or 0))
        others = [name for name in (*replaced, *rows) if name != "score.weight"]
        if others:
            fixed = f"it holds more than its factors ({others[0]})"
        tied = None
        if config.tie_word_embeddings and replaced.keys() & _VOCABULARY:
            tied = "output.weight" not in replaced and bool(raw.get("ensure_weight_tying"))
        return cls(folder, lora, factors, replaced, rows, tied, fixed)

    def in_place(self, tensor: Tensor, name: str, dim: int | None, start: int, stop: int) -> Tensor:
        """A base weight, or its [start, stop) along `dim`, with the rows of trained tokens."""
        if name not in self.rows:
            return tensor
        tensor = tensor.clone()  # it may be a view of a mapped file
        for row, values in zip(*self.rows[name]):
            if dim == 1:
                tensor[row] = values[start:stop].to(tensor.dtype)
            elif dim is None or start <= row < stop:
                tensor[row - (start if dim == 0 else 0)] = values.to(tensor.dtype)
        return tensor

    def added_to(self, tensor: Tensor, name: str, dim: int | None, start: int, stop: int) -> Tensor:
        """A base weight, or its [start, stop) along `dim`, with its adapter added in fp32."""
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_a" not in self.tensors:
            return tensor
        lora_a = self.tensors[f"{stem}.lora_a"].float()  # [rank, in] or [experts, rank, in]
        lora_b = self.tensors[f"{stem}.lora_b"].float()  # [out, rank] or [experts, out, rank]
        # Rows of B · A are rows of B, its columns are columns of A.
        if dim == tensor.dim() - 2:
            lora_b = lora_b.narrow(dim, start, stop - start)
        elif dim == tensor.dim() - 1:
            lora_a = lora_a.narrow(dim, start, stop - start)
        return (tensor.float() + self.lora.scale * (lora_b @ lora_a)).to(tensor.dtype)


def write_adapter(
    config: ModelConfig, lora: LoRAConfig, tensors: dict[str, Tensor], folder: Path, base: Path
) -> None:
    """Write whole factors for `peft` to load beside the base model.

    tensors: by our names; a verifier's `score.weight` among them.
    """
    folder.mkdir()
    family = family_written(config)[1]
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "score.weight":
            written[f"{_PREFIX}score.weight"] = tensor.contiguous()
            continue
        stem, factor = name.rsplit(".", 1)
        place = family.names[generalised(f"{stem}.weight")][0]
        kind = {"lora_a": "lora_A", "lora_b": "lora_B"}[factor]
        keys = [f"{_PREFIX}{m}.{kind}.weight" for m in _modules(place, stem, config)]
        rows = to_halves(tensor, config.head_dim) if is_rotary(name) else tensor
        matrices = [rows] if len(keys) == 1 else rows.unbind()  # one per expert
        written |= {key: matrix.contiguous() for key, matrix in zip(keys, matrices)}
    scored = config.head == "score"
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scored else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({key.split(".")[-3] for key in written if ".lora_" in key}),
        "modules_to_save": ["score"] if scored else None,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")
    save_tensors(written, folder / "adapter_model.safetensors")


def _check(raw: dict, path: Path) -> None:
    """Raise UserError for settings that give the factors another meaning than they have here."""
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA is supported")
    for key in _REFUSED:
        if raw.get(key):
            raise UserError(f"{path}: {key} is set to {raw[key]!r}, which is not supported")
    # The other named starts (pissa, olora, corda, loftq) change the base's weights.
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal"):
        raise UserError(
            f"{path}: init_lora_weights is {start!r}: such an adapter belongs to a changed base, "
            "which is not supported"
        )
    if raw.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {raw['bias']!r}; only 'none' is supported")
    dropout = raw.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(
            f"{path}: lora_dropout is {dropout!r}; a number from 0 and below 1 is expected"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = raw.get(key) or {}
        if not isinstance(pattern, dict) or not all(
            type(value) in ((int,) if key == "rank_pattern" else (int, float)) and value > 0
            for value in pattern.values()
        ):
            raise UserError(f"{path}: {key} is {pattern!r}, names with positive numbers expected")


def _stems(config: ModelConfig) -> list[str]:
    """The layers that can have an adapter: `layers.0.attention.wq`."""
    return [
        name.removesuffix(".weight")
        for name in tensor_table(config)
        if name.split(".")[-2] in TARGETS and name.endswith(".weight")
    ]


def _modules(place: Stored, stem: str, config: ModelConfig) -> list[str]:
    """The base model's module that has an adapter, or one for each expert."""
    experts = range(config.n_experts) if "{expert}" in place.key else [0]
    return [_module(place, stem, expert) for expert in experts]


def _module(place: Stored, stem: str, expert: int) -> str:
    return place.key.removesuffix(".weight").format(layer_of(stem), expert=expert)


def _plain(key: str) -> str:
    """A key of the file as PEFT would write it, without its first words.

    Without what wrappers add, and the adapter's name, which is there when the weights were saved in
    another way than PEFT's.
    """
    key = unwrapped(key).removeprefix(_PREFIX)
    key = re.sub(r"\.(lora_[AB]|trainable_tokens_delta)\.default(?=\.|$)", r".\1", key)
    key = key.replace(".modules_to_save.default.", ".")
    return f"model.{key}" if key.startswith("layers.") else key  # of a trunk alone


class _Tensors:
    """An adapter's tensors by their names in the base model, and which nobody asked for."""

    def __init__(self, file: TensorFile) -> None:
        self.file, self.keys = file, {_plain(key): key for key in file.keys}
        self._read: set[str] = set()
        if len(self.keys) < len(file.keys):
            other = next(key for key in file.keys if key not in self.keys.values())
            raise UserError(
                f"{file.path}: {other} and {self.keys[_plain(other)]} are one tensor's names: two "
                "adapters in one file"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.keys

    @property
    def unread(self) -> list[str]:
        return sorted(key for name, key in self.keys.items() if name not in self._read)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.shape(self.keys[name])

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor, if it has the shape, a dtype that weights have, and finite numbers."""
        if name not in self.keys:
            raise UserError(f"{self.file.path}: {_PREFIX}{name} is missing")
        self._read.add(name)  # more than once, where layers are fused
        key = self.keys[name]
        if self.file.shape(key) != shape or self.file.dtype(key) is None:
            dtype = self.file.dtype(key) or f"{self.file.dtype_name(key)}, no fp32, bf16 or fp16"
            raise UserError(
                f"{self.file.path}: {key} has shape {list(self.file.shape(key))} ({dtype}), "
                f"expected {list(shape)}"
            )
        tensor = self.file.read(key)
        if not tensor.isfinite().all():
            raise UserError(f"{self.file.path}: NaN or infinity in {key}; the adapter is damaged")
        return tensor


@dataclass
class _Layer:
    """One matrix's A [rank, in] and B [out, rank], in our row order, and what B · A is times."""

    a: Tensor
    b: Tensor
    alpha: float
    scale: float


def _layer(
    tensors: _Tensors,
    module: str,
    place: Stored,
    stem: str,
    config: ModelConfig,
    raw: dict[str, Any],
    where: Path,
) -> _Layer:
    *_, rows, columns = tensor_table(config)[f"{stem}.weight"].shape
    rank = number({"r": _by_pattern(raw, "rank_pattern", module, where)}, "r", str(where))
    alpha = float(_by_pattern(raw, "alpha_pattern", module, where))
    a = tensors.take(f"{module}.lora_A.weight", (rank, columns))
    b = tensors.take(f"{module}.lora_B.weight", (rows * place.parts, rank))
    if place.parts > 1:  # a fused layer's adapter: A serves all its parts, B is cut
        b = b.chunk(place.parts, place.dim)[place.index]
    if is_rotary(f"{stem}.lora_b"):
        b = to_interleaved(b, config.head_dim)
    if raw.get("use_rslora"):
        alpha *= rank**0.5  # its scale is alpha / √rank
    return _Layer(a, b, alpha, alpha / rank)


def _by_pattern(raw: dict[str, Any], patterns: str, module: str, where: Path) -> Any:
    """A layer's rank or alpha: that of the first pattern whose end its name is, as PEFT matches."""
    default = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}[patterns]
    for pattern, value in (raw.get(patterns) or {}).items():
        if _matches(rf"(.*\.)?({pattern})$", module, where, patterns):
            return value
    kind = int if default == "r" else float
    return number(raw, default, str(where), 8, kind)


def _matches(pattern: str, module: str, where: Path, key: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except (re.error, RecursionError) as error:
        raise UserError(f"{where}: {key} has {pattern!r}, no pattern ({error})") from None


def _is_targeted(raw: dict[str, Any], module: str, where: Path) -> bool:
    """Whether the config says that a layer has an adapter, as PEFT reads it.

    None for `target_modules` is PEFT's choice by the kind of model: then the file alone tells.
    """
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules") or []
    if not targets or _named(excluded, module, where, "exclude_modules"):
        return False
    if any(f".{saved}." in f".{module}." for saved in raw.get("modules_to_save") or []):
        return False  # saved whole
    if targets == "all-linear":
        return ".experts." not in module  # which are one tensor in newer versions
    if not _named(targets, module, where, "target_modules"):
        return False
    layers, number_of = raw.get("layers_to_transform"), layer_of(module)
    if isinstance(targets, str) or layers in (None, []):
        return True
    return number_of in (layers if isinstance(layers, list) else [layers])


def _named(names: Any, module: str, where: Path, key: str) -> bool:
    """Whether names, by their ends, or one pattern mean a module."""
    if isinstance(names, str):
        return _matches(f"(?:{names})\\Z", module, where, key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: {key} is {names!r}; names or one pattern are expected")
    return any(module == name or module.endswith(f".{name}") for name in names)


def _weights(
    tensors: _Tensors, raw: dict[str, Any], config: ModelConfig, where: Path
) -> tuple[dict[str, Tensor], dict[str, tuple[list[int], Tensor]]]:
    """The whole weights that were trained beside the factors, and the rows of trained tokens."""
    replaced: dict[str, Tensor] = {}
    rows: dict[str, tuple[list[int], Tensor]] = {}
    names = family_written(config)[1].names
    embedding, base_size = names["tok_embeddings.weight"][0].key, config.vocab_size
    if embedding in tensors:  # it may have more tokens than the base
        config = replace(config, vocab_size=tensors.shape(embedding)[0])
    wanted = dict(tensor_table(config))
    for head in ("score", "lm"):
        wanted |= tensor_table(replace(config, head=head, tie_word_embeddings=False))
    for name, spec in wanted.items():
        places = names[generalised(name)]
        key = places[0].key.format(layer_of(name), expert=0)
        if places[0].parts == 1 and "{expert}" not in places[0].key and key in tensors:
            tensor = tensors.take(key, spec.shape)
            replaced[name] = to_interleaved(tensor, config.head_dim) if is_rotary(name) else tensor
        delta = key.removesuffix("weight") + "token_adapter.trainable_tokens_delta"
        if delta in tensors:
            ids = _token_ids(raw, key.split(".")[-2], where, config.vocab_size)
            rows[name] = ids, tensors.take(delta, (len(ids), config.dim))
    more = config.vocab_size != base_size
    alone = more and "output.weight" not in replaced and not raw.get("ensure_weight_tying")
    if alone and config.head == "lm" and "score.weight" not in replaced:
        raise UserError(
            f"{where.parent}: its {embedding} has {config.vocab_size} rows, the base {base_size}, "
            f"and there is no {names['output.weight'][0].key} to go with it"
        )
    return replaced, rows


def _token_ids(raw: dict[str, Any], module: str, where: Path, vocab_size: int) -> list[int]:
    """The ids whose rows were trained: of one list for the embedding, or by the module's name."""
    indices = raw.get("trainable_token_indices")
    ids = indices.get(module) if isinstance(indices, dict) else indices
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise UserError(
            f"{where}: trainable_token_indices is {indices!r}; ids below {vocab_size} are expected"
        )
    return ids


def _even(
    layers: dict[str, list[_Layer]], config: ModelConfig, dropout: float
) -> tuple[LoRAConfig, dict[str, Tensor], str | None]:
    """One rank and scale for all layers, and why the adapter cannot be trained on, if so.

    The factors of a smaller rank get zeros, and where scales differ B takes them over: the same
    product. A layer without an adapter gets zeros alone.
    """
    all_layers = [layer for of_experts in layers.values() for layer in of_experts]
    rank = max(len(layer.a) for layer in all_layers)
    scales = {layer.scale for layer in all_layers}
    alpha, fixed = scales.pop() * rank, None
    if scales:
        alpha = float(rank)
        fixed = "its layers' scales differ (alpha / rank)"
    elif len({layer.alpha for layer in all_layers}) == 1 and len(all_layers[0].a) == rank:
        alpha = all_layers[0].alpha  # as it stands, without a rounding
    factors: dict[str, Tensor] = {}
    targets = {stem.rsplit(".", 1)[-1] for stem in layers}
    lora = LoRAConfig(rank, alpha, dropout, tuple(t for t in TARGETS if t in targets))
    for name, spec in lora_table(config, lora).items():
        stem, factor = name.rsplit(".", 1)
        if stem not in layers:
            factors[name] = torch.zeros(spec.shape)
            continue
        matrices = []
        for layer in layers[stem]:
            lacking = rank - len(layer.a)
            if factor == "lora_a":
                matrices.append(F.pad(layer.a, (0, 0, 0, lacking)))
            else:
                b = layer.b.float() * layer.scale if fixed else layer.b
                matrices.append(F.pad(b, (0, lacking)))
        factors[name] = torch.stack(matrices) if len(spec.shape) == 3 else matrices[0]
    return lora, factors, fixed
