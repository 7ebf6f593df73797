"""Tiny random Llamas made by transformers, and trained ones of ours under their names."""

import random
from pathlib import Path

import torch
import torch.distributed as dist

from src.checkpoint.load import load_model
from src.checkpoint.names import hf_tensors
from src.checkpoint.save import merged_weights
from src.checkpoint.source import Checkpoint
from src.models.batch import Sequence
from src.models.layout import tensor_table
from src.models.lora import LoRAConfig
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.settings.declaration import build
from src.settings.scripts import SolverTrainSettings

VOCAB = 64
PAD = 0  # never inside a sequence: transformers' classifier finds the last token by it
EOS = 2


def save_llama(
    folder: Path, head: str = "lm", seed: int = 0, tied: bool = False, **sizes: int
) -> Path:
    """A Hugging Face folder with large enough weights for every part to matter.

    Grouped heads, degrees 1, 2 and 4.
    """
    from transformers import (  # seconds that workers save
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
    )

    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    config = LlamaConfig(
        **{**shape, **sizes},
        max_position_embeddings=64,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
        num_labels=1,
    )
    model = (LlamaForCausalLM if head == "lm" else LlamaForSequenceClassification)(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.2 * torch.randn(weight.shape))  # norms that are not all one
    model.save_pretrained(folder)
    return folder


def save_experts(folder: Path, layers: int = 2, heads: int = 3) -> Path:
    """A Mixtral of which nothing divides by 2 or 4: heads (3), kv heads, widths, vocabulary.

    As different as save_llama's.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=VOCAB + 3,
        hidden_size=33,
        intermediate_size=21,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=10,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
        sliding_window=6,
        num_local_experts=5,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.3,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def theirs(folder: Path):
    """The folder's model as transformers runs it, in fp32."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = (Path(folder) / "config.json").read_text()
    kind = (
        AutoModelForSequenceClassification
        if "SequenceClassification" in config
        else AutoModelForCausalLM
    )
    eager = {"attn_implementation": "eager"} | (
        {"experts_implementation": "eager"} if "Mixtral" in config else {}
    )
    return kind.from_pretrained(folder, dtype=torch.float32, **eager)


def ours(
    folder: Path,
    parallel: Parallel,
    dtype: torch.dtype = torch.float32,
    head: str | None = None,
    seed: int = 0,
    lora: LoRAConfig | None = None,
    zero: int = 0,
    offload: bool = False,
    stages_per_rank: int = 1,
):
    checkpoint = Checkpoint.open(str(folder))
    shared = {"zero": zero, "offload": offload, "stages_per_rank": stages_per_rank}
    return load_model(checkpoint, parallel, dtype, head, seed, lora=lora, **shared)


def whole_weights(model: Transformer, parallel: Parallel) -> dict[str, torch.Tensor]:
    """All ranks' weights put together, adapters merged in, in transformers' names and row order."""
    parts = [None] * parallel.mp_size
    dist.all_gather_object(parts, merged_weights(model, parallel), group=parallel.mp_group)
    table = tensor_table(model.config)
    whole = {}
    for name in parts[0]:
        whole |= hf_tensors(name, table[name].join([part[name] for part in parts]), model.config)
    return whole


def some_conversations(n: int, seed: int = 0) -> list[Sequence]:
    """`some_sequences` whose longer responses have others' tokens in them, or behind them, too.

    Where they are keeps the first gradients away from 0, of which Adam makes steps of rounding.
    """
    rows = []
    for i, s in enumerate(some_sequences(n, seed)):
        first, last = s.prompt_length, len(s.tokens)
        if s.response_length > 4:
            spans = [(first, last - 2), (last - 1, last)] if i % 2 else [(first, last - 2)]
            s = Sequence.of_spans(s.tokens, spans)
        rows.append(s)
    assert any(s.spans for s in rows)
    return rows


def some_sequences(n: int, seed: int = 0) -> list[Sequence]:
    """Prompts of 2 to 7 tokens, responses of 1 to 8 that end with EOS; many lengths, no pad."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        prompt = [1, *(rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 7)))]
        response = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(0, 8))] + [EOS]
        rows.append(Sequence(prompt + response, len(prompt)))
    return rows


def padded(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with pads on the right, and the attention mask."""
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [PAD] * (longest - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    return ids, mask


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative distance between tensors of the same name.

    That is the norm of the difference over the norm.
    """
    assert a.keys() == b.keys()
    return max(
        float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp_min(1e-12))
        for k in a
    )


def training(**flags) -> SolverTrainSettings:
    """A run's settings where only some of them matter."""
    return build(
        SolverTrainSettings, {"ckpt_dir": "-", "save_dir": "-", "train_file": "-", **flags}
    )
