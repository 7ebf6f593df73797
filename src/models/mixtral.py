"""Mixtral: Mistral's attention, and for each token the two likeliest of eight experts."""

from src.models.config import ModelConfig
from src.models.family import Family, Stored
from src.models.llama import ATTENTION


def experts(block: str, w1: str, w2: str, w3: str) -> dict[str, tuple[Stored, ...]]:
    """Names of an expert layer, in both forms.

    Released files have a matrix per expert, newer ones w1 and w3 of all experts fused.
    """
    ours, each = "layers.{}.feed_forward.experts", f"{block}.experts.{{expert}}"
    fused = "model.layers.{}.mlp.experts"
    return {
        f"{ours}.w1.weight": (
            Stored(f"{each}.{w1}.weight"),
            Stored(f"{fused}.gate_up_proj", 0, 2, 1),
        ),
        f"{ours}.w2.weight": (Stored(f"{each}.{w2}.weight"), Stored(f"{fused}.down_proj")),
        f"{ours}.w3.weight": (
            Stored(f"{each}.{w3}.weight"),
            Stored(f"{fused}.gate_up_proj", 1, 2, 1),
        ),
    }


_BLOCK = "model.layers.{}.block_sparse_moe"
_GATE = (Stored(f"{_BLOCK}.gate.weight"), Stored("model.layers.{}.mlp.gate.weight"))

MIXTRAL = Family(
    "Mixtral",
    {**ATTENTION, "layers.{}.feed_forward.gate.weight": _GATE, **experts(_BLOCK, "w1", "w2", "w3")},
    keys={"n_experts": "num_local_experts"},
    defaults={
        "n_kv_heads": 8,
        "norm_eps": 1e-5,
        "rope_theta": 1e6,
        "n_experts": 8,
        "experts_per_token": 2,
        "router_aux_loss_coef": 0.001,
    },
    windows="always",
    presets={
        "mixtral-8x7b-instruct-v0.1": ModelConfig(
            dim=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            hidden_dim=14336,
            vocab_size=32000,
            norm_eps=1e-5,
            rope_theta=1e6,
            max_seq_len=32768,
            family="mixtral",
            n_experts=8,
            experts_per_token=2,
        )
    },
)
