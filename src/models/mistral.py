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
            4096, 32, 32, 8, 128, 14336, 32000, 1e-5, 1e6, max_seq_len=32768, family="mistral"
        )
    },
)
