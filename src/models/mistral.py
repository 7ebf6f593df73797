"""Mistral: Llama's names, a sliding window in v0.1."""

from src.models.config import ModelConfig
from src.models.family import Family
from src.models.llama import NAMES

MISTRAL = Family(
    "Mistral",
    NAMES,
    defaults={"n_kv_heads": 8, "sliding_window": 4096},
    windows="always",
    presets={
        "mistral-7b-instruct-v0.2": ModelConfig(
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
            family="mistral",
        )
    },
)
