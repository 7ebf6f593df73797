"""GGUF files, as llama.cpp and its tools leave them: tensors, and the sizes in their metadata.

A quantised tensor is read as the fp32 numbers that it stands for, one tensor at a time. The
tokenizer is in gguf_tokenizer.py.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from src.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

# What the tensors are packed as: numbers, and blocks that the library unpacks.
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = {
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
}
# `general.architecture` → Hugging Face's model_type; Llama's serves Mistral and Mixtral too.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}
# config.json's keys for the metadata's, after the architecture's name
_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
# What changes the network's function and is known here only by its usual value.
_USUAL: dict[str, tuple[object, ...]] = {
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
}
# A scaling of the rotation's frequencies is a tensor, not metadata: Llama 3's (see `_llama3`).
ROPE_FREQS = "rope_freqs.weight"


class GGUFFile:
    """A file of named tensors and metadata, mapped. Like `files.TensorFile`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        self._opened: GGUFReader | None = None
        self._tensors = {tensor.name: i for i, tensor in enumerate(self._reader.tensors)}
        self.keys = [key for key in self._tensors if key != ROPE_FREQS]
        if (count := self.get("split.count", 1)) > 1:
            raise UserError(
                f"{path}: is one of {count} parts; join them first (llama-gguf-split --merge)"
            )

    @property
    def _reader(self) -> "GGUFReader":
        if self._opened is None:
            # late: only this kind of file needs it
            from gguf import GGUFReader

            try:
                self._opened = GGUFReader(self.path)
            except Exception as error:  # a damaged file raises whatever its bytes lead to
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(
                    f"{self.path}: cannot be read as GGUF, is it damaged or cut short? ({reason})"
                ) from None
        return self._opened

    def release(self) -> None:
        """Let go of the mapped pages."""
        self._opened = None

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        field = self._reader.fields.get(key)
        if field is None:
            return default
        try:
            return field.contents()
        except (ValueError, IndexError) as error:  # bytes that are no text, among others
            raise UserError(f"{self.path}: {key} cannot be read ({error})") from None

    def _tensor(self, key: str):
        return self._reader.tensors[self._tensors[key]]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensor(key).shape))

    def dtype(self, key: str) -> torch.dtype | None:
        """What it is read as: fp32 where it is quantised; None where nothing here unpacks it."""
        kind = self.dtype_name(key)
        return PLAIN.get(kind, torch.float32 if kind in QUANTISED else None)

    def dtype_name(self, key: str) -> str:
        """Whatever it is, for messages."""
        return self._tensor(key).tensor_type.name

    def read(self, key: str, cuts: dict[int, tuple[int, int]] | None = None) -> Tensor:
        """The tensor, or its [start, stop) along each dim of `cuts`.

        Rows alone are unpacked where rows alone are wanted.
        """
        from gguf import dequantize

        tensor, dtype, cuts = self._tensor(key), self.dtype(key), dict(cuts or {})
        data = tensor.data  # its last axis is in bytes, where it is packed
        last = data.ndim - 1
        data = data[tuple(slice(*cuts.pop(dim, (None, None))) for dim in range(last))]
        if dtype == torch.bfloat16:
            whole = torch.from_numpy(np.array(data)).view(torch.bfloat16)
        elif dtype == torch.float16:
            whole = torch.from_numpy(np.array(data))
        else:
            whole = torch.from_numpy(np.array(dequantize(data, tensor.tensor_type)))
        for dim, (start, stop) in cuts.items():
            whole = whole.narrow(dim, start, stop - start)
        return whole

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        """What the metadata says of the model's sizes, by the keys of a `config.json`.

        Raises UserError for architectures, and for settings of them, that are not known here.
        """
        name = self.get("general.architecture")
        if self.get("general.type", "model") != "model":
            raise UserError(f"{self.path}: is a {self.get('general.type')}, no model")
        if name not in ARCHITECTURES:
            raise UserError(
                f"{self.path}: general.architecture is {name!r}; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        for key, usual in _USUAL.items():
            if (value := self.get(f"{name}.{key}")) is not None and value not in usual:
                raise UserError(f"{self.path}: {name}.{key} is {value!r}, which is not supported")
        raw: dict[str, Any] = {"model_type": ARCHITECTURES[name]}
        for theirs, key in _SIZES.items():
            value = self.get(f"{name}.{key}")
            if isinstance(value, list):  # one for each layer
                if len(set(value)) != 1:
                    raise UserError(
                        f"{self.path}: {name}.{key} differs from layer to layer, "
                        "which is not supported"
                    )
                value = value[0]
            if isinstance(value, float):
                # stored in 32 bits: 1e-05 is meant where 9.99999974e-06 is read
                value = float(str(np.float32(value)))
            if value is not None:
                raw[theirs] = value
        if not raw.get("num_experts"):
            raw.pop("num_experts", None), raw.pop("num_experts_per_tok", None)
        elif name == "llama":
            raw |= {"model_type": "mixtral", "num_local_experts": raw["num_experts"]}
        else:
            raw["moe_intermediate_size"] = self.get(f"{name}.expert_feed_forward_length")
            raw["norm_topk_prob"] = self.get(f"{name}.expert_weights_norm", True)
        if name == "llama" and raw.get("sliding_window") and raw["model_type"] == "llama":
            raw["model_type"] = "mistral"
        raw.setdefault("sliding_window", None)
        raw["use_sliding_window"] = bool(raw["sliding_window"])
        raw["head_dim"] = self._head_dim(name, raw)
        raw["rope_scaling"] = self._scaling(name, raw)
        raw["tie_word_embeddings"] = "output.weight" not in self._tensors
        if "token_embd.weight" in self._tensors:
            raw["vocab_size"] = self.shape("token_embd.weight")[0]
        return raw

    def _head_dim(self, name: str, raw: dict[str, Any]) -> int | None:
        """Width of a head, all of which must be rotated."""
        dim, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
        rotated = self.get(f"{name}.rope.dimension_count")
        by_width = dim // heads if isinstance(dim, int) and isinstance(heads, int) and heads else 0
        key_length = self.get(f"{name}.attention.key_length", by_width or rotated)
        value_length = self.get(f"{name}.attention.value_length", key_length)
        if value_length != key_length or rotated not in (None, key_length):
            raise UserError(
                f"{self.path}: heads of {key_length} for keys and {value_length} for values, "
                f"{rotated} of them rotated; only heads of one width, rotated whole, are supported"
            )
        return key_length

    def _scaling(self, name: str, raw: dict[str, Any]) -> dict[str, Any] | None:
        """`rope_scaling` of a config.json.

        llama.cpp scales by the metadata and by the tensor, each where it is there; a config.json
        has but one scaling. Raises UserError for both.
        """
        key = f"{name}.rope.scaling"
        kind = self.get(f"{key}.type", "linear")
        factor = self.get(f"{key}.factor", self.get(f"{name}.rope.scale_linear"))
        is_scaled = kind not in ("none", "linear", "yarn") or (
            kind != "none" and factor not in (None, 0.0, 1.0)
        )
        if ROPE_FREQS in self._tensors:
            divisors = self.read(ROPE_FREQS)  # [head_dim / 2]
            if not (divisors == 1).all():
                if is_scaled:
                    raise UserError(
                        f"{self.path}: {ROPE_FREQS} divides the rotation's frequencies (by up to "
                        f"{float(divisors.max()):g}) and {key}.type is {kind!r} with factor "
                        f"{factor}; one scaling of them is supported, not two"
                    )
                return self._llama3(raw)
        if not is_scaled:
            return None
        scaling = {"rope_type": kind, "factor": factor}
        original = self.get(f"{name}.rope.scaling.original_context_length")
        if original:
            scaling["original_max_position_embeddings"] = original
        for key in ("beta_fast", "beta_slow"):
            if (value := self.get(f"{name}.rope.scaling.yarn_{key}")) is not None:
                scaling[key] = value
        return scaling

    def _llama3(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Llama 3's scaling, from what each frequency is divided by.

        By 1 above a frequency, by the factor below another, and between them by what changes
        linearly (as 1 / divisor) with the frequency. Only the two frequencies' ratios to the
        context are in the numbers: 1 and 4 are those of all released models.
        """
        divisors = self.read(ROPE_FREQS).double()  # [head_dim / 2]
        theta, head_dim = float(raw.get("rope_theta", 1e4)), raw["head_dim"] or 2
        frequencies = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        wavelengths = 2 * torch.pi / frequencies
        factor, low, high = float(divisors.max()), 1.0, 4.0
        between = (divisors > 1.001) & (divisors < 0.999 * factor)
        if divisors.shape == wavelengths.shape and between.any():
            smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
            context = (wavelengths * (smooth * (high - low) + low))[between].median()
            expected = (context / wavelengths - low) / (high - low)
            expected = expected.clamp(0, 1)
            wanted = 1 / ((1 - expected) / factor + expected)
            if torch.allclose(wanted, divisors, rtol=1e-3):
                return {
                    "rope_type": "llama3",
                    "factor": round(factor, 4),
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": round(float(context)),
                }
        raise UserError(
            f"{self.path}: {ROPE_FREQS} scales the rotation in a way that is not Llama 3's, "
            "which is not supported"
        )
