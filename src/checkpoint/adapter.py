"""LoRA adapters in PEFT's format, by Hugging Face's names.

A folder holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from src.checkpoint.files import TensorFile, read_json
from src.checkpoint.names import generalised, is_rotary, layer_of, to_halves, to_interleaved
from src.errors import UserError
from src.models.config import ModelConfig, number
from src.models.family import Stored
from src.models.hf_config import FAMILIES, family_written
from src.models.layout import tensor_table
from src.models.lora import TARGETS, LoRAConfig, lora_table

_PREFIX = "base_model.model."
# Settings of PEFT's that make another function of the same factors: refused when they are set.
_REFUSED = (
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "target_parameters",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "megatron_config",
    "use_qalora",
    "trainable_token_indices",
)


class Adapter:
    """An adapter's factors, whole, in our names and row order.

    `layers.0.attention.wq.lora_a` is [rank, in], `…lora_b` [out, rank]; experts' are stacked.
    """

    def __init__(
        self, folder: Path, lora: LoRAConfig, tensors: dict[str, Tensor], score: Tensor | None
    ) -> None:
        """score: the scalar head trained with a verifier's adapter."""
        self.folder, self.lora, self.tensors, self.score = folder, lora, tensors, score

    @classmethod
    def open(cls, path: str, config: ModelConfig) -> "Adapter":
        """Read a folder for a model of this config.

        Raises UserError for what does not fit the model, or is not supported.
        """
        folder = Path(path)
        config_file = folder / "adapter_config.json"
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
        rank = number(raw, "r", str(config_file))
        alpha = number(raw, "lora_alpha", str(config_file), 8, float)
        dropout = raw.get("lora_dropout") or 0.0
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise UserError(
                f"{config_file}: lora_dropout is {dropout!r}; "
                "a number from 0 and below 1 is expected"
            )
        if raw.get("use_rslora"):
            alpha *= rank**0.5  # its scale is alpha / √rank
        opened = TensorFile(file)
        present = set(opened.keys)
        unread = set(present)
        tensors: dict[str, Tensor] = {}
        targets: list[str] = []
        for stem in _stems(config):
            # Qwen v1 leaves here as a Qwen2 folder: its adapter may have either family's names.
            for family in (family_written(config)[1], FAMILIES[config.family]):
                place = family.names[generalised(f"{stem}.weight")][0]
                keys = [_keys(place, stem, config, factor) for factor in ("lora_A", "lora_B")]
                if all(key in present for pair in keys for key in pair):
                    tensors |= _factors(opened, keys, place, stem, config, rank)
                    targets.append(stem.rsplit(".", 1)[-1])
                    unread -= {key for pair in keys for key in pair}
                    break
        head_key = f"{_PREFIX}score.weight"
        score = _read(opened, head_key, (1, config.dim)) if head_key in unread else None
        unread.discard(head_key)
        # Nothing may be left over or lacking: an adapter read in part would be another adapter.
        if unread:
            raise UserError(
                f"{file}: {sorted(unread)[0]} fits no layer of this model "
                f"({len(unread)} such tensors)"
            )
        if not tensors:
            raise UserError(f"{file}: holds no adapter for this model")
        lora = LoRAConfig(
            rank, float(alpha), float(dropout), tuple(t for t in TARGETS if t in targets)
        )
        lacking = [name for name in lora_table(config, lora) if name not in tensors]
        if lacking:
            raise UserError(
                f"{file}: has nothing for {lacking[0]}, though for other layers' "
                f"({len(lacking)} are lacking)"
            )
        return cls(folder, lora, tensors, score)

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
        keys = _keys(place, stem, config, {"lora_a": "lora_A", "lora_b": "lora_B"}[factor])
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
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    save_file(written, folder / "adapter_model.safetensors", metadata={"format": "pt"})


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
    saved_modules = raw.get("modules_to_save") or []
    if saved_modules not in ([], ["score"], ["classifier", "score"]):
        raise UserError(
            f"{path}: modules_to_save is {saved_modules!r}; "
            "only a classifier's 'score' is supported"
        )


def _stems(config: ModelConfig) -> list[str]:
    """The layers that can have an adapter: `layers.0.attention.wq`."""
    return [
        name.removesuffix(".weight")
        for name in tensor_table(config)
        if name.split(".")[-2] in TARGETS and name.endswith(".weight")
    ]


def _keys(place: Stored, stem: str, config: ModelConfig, factor: str) -> list[str]:
    """PEFT's key of a factor, or one for each expert."""
    experts = range(config.n_experts) if "{expert}" in place.key else [0]
    stems = [
        place.key.removesuffix(".weight").format(layer_of(stem), expert=expert)
        for expert in experts
    ]
    return [f"{_PREFIX}{key}.{factor}.weight" for key in stems]


def _read(file: TensorFile, key: str, shape: tuple[int, ...]) -> Tensor:
    """A factor, if it has the shape, a dtype that weights have, and finite numbers."""
    if file.shape(key) != shape or file.dtype(key) is None:
        dtype = file.dtype(key) or "no fp32, bf16 or fp16"
        raise UserError(
            f"{file.path}: {key} has shape {list(file.shape(key))} ({dtype}), "
            f"expected {list(shape)}"
        )
    tensor = file.read(key)
    if not tensor.isfinite().all():
        raise UserError(f"{file.path}: NaN or infinity in {key}; the adapter is damaged")
    return tensor


def _factors(
    file: TensorFile,
    keys: list[list[str]],
    place: Stored,
    stem: str,
    config: ModelConfig,
    rank: int,
) -> dict[str, Tensor]:
    """A layer's A and B by our names; `keys`: A's in the file, and B's, one for each expert."""
    *_, rows, columns = tensor_table(config)[f"{stem}.weight"].shape
    matrices_a = [_read(file, key, (rank, columns)) for key in keys[0]]
    matrices_b = [_read(file, key, (rows * place.parts, rank)) for key in keys[1]]
    if place.parts > 1:  # a fused layer's adapter: A serves all its parts, B is cut
        matrices_b = [matrix.chunk(place.parts, place.dim)[place.index] for matrix in matrices_b]
    if "{expert}" in place.key:
        lora_a, lora_b = torch.stack(matrices_a), torch.stack(matrices_b)
    else:
        lora_a, lora_b = matrices_a[0], matrices_b[0]
    if is_rotary(f"{stem}.lora_b"):
        lora_b = to_interleaved(lora_b, config.head_dim)
    return {f"{stem}.lora_a": lora_a, f"{stem}.lora_b": lora_b}
