"""Tensor names and row orders: ours (Meta's), Hugging Face's and GGUF's; what wrappers add."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from src.models.config import ModelConfig
from src.models.family import Stored
from src.models.hf_config import FAMILIES, family_written

_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)|(?<=\btransformer\.h\.)\d+(?=\.)")

# Meta rotates neighbouring dimensions as a pair, Hugging Face a head's first half against its
# second: these tensors' rows are reordered between the two.
_ROTARY = re.compile(r"attention\.(wq|wk|q_norm|k_norm)\.(weight|bias|lora_b)$")


def generalised(name: str) -> str:
    """`layers.7.ffn_norm.weight` → `layers.{}.ffn_norm.weight`."""
    return _LAYER.sub("{}", name, count=1)


def layer_of(name: str) -> int | None:
    """`layers.7.ffn_norm.weight` → 7; None outside the layers."""
    match = _LAYER.search(name)
    return int(match[0]) if match else None


def module_of(name: str) -> str:
    """`layers.7.ffn_norm.weight` → `layers.7`, `norm.weight` → `norm`: what one stage has whole."""
    layer = layer_of(name)
    return name.split(".")[0] if layer is None else f"layers.{layer}"


def is_rotary(name: str) -> bool:
    """Whether this tensor's rows (by our name) are reordered between Meta and Hugging Face."""
    return _ROTARY.search(name) is not None


def to_interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Hugging Face's row order (halves of a head) → Meta's (interleaved pairs), head by head."""
    # [heads · head_dim, …] → [heads, 2, head_dim / 2, …] → [heads, head_dim / 2, 2, …] → flat again
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_interleaved`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def hf_tensors(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """A whole tensor of ours as it is written for Hugging Face: key → rows, experts one by one."""
    if is_rotary(name):
        tensor = to_halves(tensor, config.head_dim)
    key = family_written(config)[1].names[generalised(name)][0].key
    if "{expert}" in key:
        return {
            key.format(layer_of(name), expert=expert): matrix.contiguous()
            for expert, matrix in enumerate(tensor)
        }
    return {key.format(layer_of(name)): tensor.contiguous()}


# --- how each kind of file calls and orders the tensors


@dataclass(frozen=True)
class Naming:
    """One convention.

    output: its key of the output layer; places(name, config): where a tensor of ours may lie, by
    its generalised name; halves(config): whether heads' rows are in Hugging Face's order.
    """

    output: str
    places: Callable[[str, ModelConfig], tuple[Stored, ...]]
    halves: Callable[[ModelConfig], bool]


def _hf_places(name: str, config: ModelConfig) -> tuple[Stored, ...]:
    places = FAMILIES[config.family].names[name]
    if name == "tok_embeddings.weight" and config.tie_word_embeddings:
        # of two names for one tensor some savers keep the other
        places += FAMILIES[config.family].names["output.weight"]
    return places


def _meta_places(name: str, config: ModelConfig) -> tuple[Stored, ...]:
    """Under our own name, or a matrix per expert, as Mistral writes them."""
    return Stored(name), Stored(name.replace("experts.", "experts.{expert}."))


# llama.cpp's names; its older files have a matrix per expert
GGUF_NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
    "layers.{}.attention_norm.weight": "blk.{}.attn_norm.weight",
    "layers.{}.attention.wq.weight": "blk.{}.attn_q.weight",
    "layers.{}.attention.wk.weight": "blk.{}.attn_k.weight",
    "layers.{}.attention.wv.weight": "blk.{}.attn_v.weight",
    "layers.{}.attention.wq.bias": "blk.{}.attn_q.bias",
    "layers.{}.attention.wk.bias": "blk.{}.attn_k.bias",
    "layers.{}.attention.wv.bias": "blk.{}.attn_v.bias",
    "layers.{}.attention.q_norm.weight": "blk.{}.attn_q_norm.weight",
    "layers.{}.attention.k_norm.weight": "blk.{}.attn_k_norm.weight",
    "layers.{}.attention.wo.weight": "blk.{}.attn_output.weight",
    "layers.{}.ffn_norm.weight": "blk.{}.ffn_norm.weight",
    "layers.{}.feed_forward.w1.weight": "blk.{}.ffn_gate.weight",
    "layers.{}.feed_forward.w2.weight": "blk.{}.ffn_down.weight",
    "layers.{}.feed_forward.w3.weight": "blk.{}.ffn_up.weight",
    "layers.{}.feed_forward.gate.weight": "blk.{}.ffn_gate_inp.weight",
    "layers.{}.feed_forward.experts.w1.weight": "blk.{}.ffn_gate_exps.weight",
    "layers.{}.feed_forward.experts.w2.weight": "blk.{}.ffn_down_exps.weight",
    "layers.{}.feed_forward.experts.w3.weight": "blk.{}.ffn_up_exps.weight",
}


def _gguf_places(name: str, config: ModelConfig) -> tuple[Stored, ...]:
    key = GGUF_NAMES[name]
    return Stored(key), Stored(key.replace("_exps.", ".{expert}."))


HF = Naming("lm_head.weight", _hf_places, lambda config: True)
META = Naming("output.weight", _meta_places, lambda config: False)
# llama.cpp reorders the rows of Llama's architecture to Meta's, and of no other
GGUF = Naming(
    "output.weight",
    _gguf_places,
    lambda config: config.family not in ("llama", "mistral", "mixtral"),
)


def naming_of(keys: Iterable[str]) -> Naming:
    """The convention that a file's keys follow, once what wrappers add is taken off."""
    for key in keys:
        if key.startswith(("token_embd.", "blk.")):
            return GGUF
        if "tok_embeddings." in key or "attention.w" in key:
            return META
    return HF


# --- what is no weight of ours

# Written into some files, and computed here: rotary tables, causal masks, positions.
_COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|rope\.freqs|freqs_cis"
    r"|attn\.(bias|masked_bias)|self_attn\.(bias|masked_bias)|position_ids)$"
)
# What the tensors of quantised files are called, and by whom.
_QUANTISED = {
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.(absmax|quant_map|nested_absmax|quant_state\..*|SCB|weight_format)$": "bitsandbytes",
    r"\.(weight_scale|weight_scale_inv|input_scale|activation_scale)$": "fp8 or int8",
    r"\.(weight_packed|weight_shape)$": "compressed-tensors",
    r"\.(W_q|_packed_weight|codes|codebooks|SU|SV|Qidxs)$": "HQQ, AQLM or QuIP",
    r"\.(weight|gate_up_proj|down_proj)_(blocks|scales)$": "mxfp4",
}


def is_computed(key: str) -> bool:
    """Whether a tensor of a file is a table that is computed here."""
    return _COMPUTED.search(key) is not None


def quantised_by(key: str) -> str | None:
    """Whose quantisation a tensor's key tells of; None for a plain one."""
    return next((who for pattern, who in _QUANTISED.items() if re.search(pattern, key)), None)


# --- what wrappers add

# Names of modules that wrap others, wherever they stand: torch.compile, DataParallel and DeepSpeed,
# FSDP and Fairscale, activation checkpointing, Accelerate.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module"
    r"|_forward_module)\."
)
# How the key of a file's first tensor ends, and with what the trunk's names begin in a whole model.
_ANCHORS = (
    ("model.embed_tokens.weight", "model."),
    ("embed_tokens.weight", "model."),
    ("transformer.wte.weight", "transformer."),
    ("wte.weight", "transformer."),
    ("tok_embeddings.weight", ""),
    ("model.norm.weight", "model."),
    ("transformer.ln_f.weight", "transformer."),
)
_TRUNK = ("embed_tokens", "layers", "norm", "wte", "h", "ln_f")


@dataclass(frozen=True)
class Spelling:
    """A file's keys by the names that they have in a whole, unwrapped model.

    keys: name → the file's key; lead: what the file puts before a name, and dropped: what it leaves
    out there.
    """

    keys: dict[str, str]
    lead: str = ""
    dropped: str = ""

    def of(self, name: str) -> str:
        """The file's key of a name, or what it would be: messages speak as the file does."""
        return self.keys.get(name, self.lead + name.removeprefix(self.dropped))

    @property
    def described(self) -> str | None:
        """An example of a key that is read by another name; None where all are plain."""
        renamed = [(name, key) for name, key in self.keys.items() if name != key]
        name, key = min(renamed, key=lambda pair: "embed" not in pair[0], default=(None, None))
        return name and f"{key} is read as {name}"


def unwrapped(key: str) -> str:
    """A key without what wrappers put into it."""
    return _WRAPPERS.sub("", key)


def spelled(keys: Iterable[str]) -> Spelling:
    """Take off what wrappers put before and into a file's keys, and add what a trunk alone lacks.

    The embedding tells: what stands before it stands before all. Where that is ambiguous, nothing
    is changed.
    """
    keys = list(keys)
    inner = {unwrapped(key): key for key in keys}
    if len(inner) < len(keys):  # two models in one file: whose weights are meant?
        return Spelling({key: key for key in keys})
    for ending, root in _ANCHORS:
        leads = {name.removesuffix(ending) for name in inner if f".{name}".endswith(f".{ending}")}
        if len(leads) != 1:
            continue
        lead = leads.pop()
        dropped = "" if ending.startswith(root) else root
        names = {}
        for name, key in inner.items():
            plain = name.removeprefix(lead)
            if dropped and name.startswith(lead) and plain.split(".")[0] in _TRUNK:
                plain = root + plain
            names[plain] = key
        if len(names) < len(inner):
            break
        anchor = inner[lead + ending]
        return Spelling(names, anchor[: -len(ending)] if anchor.endswith(ending) else lead, dropped)
    return Spelling(inner)
