"""Small models of every mechanism that families have, and how far two results are apart."""

from dataclasses import replace

import torch
from torch import Tensor

from src.checkpoint.load import put
from src.models.batch import Batch, Sequence
from src.models.config import ModelConfig
from src.models.init import initial_std, random_tensor
from src.models.layout import tensor_table
from src.models.transformer import Transformer, build
from src.parallel.setup import Parallel

CPU = torch.device("cpu")
VOCABULARY = 1000
LLAMA = ModelConfig(256, 2, 4, 2, 64, 384, VOCABULARY, max_seq_len=512)
MODELS = {
    "llama": LLAMA,
    "tied": replace(LLAMA, tie_word_embeddings=True),
    "window": replace(LLAMA, sliding_window=9),
    "norms of heads": replace(LLAMA, qk_norm=True),
    "biases": replace(LLAMA, qkv_bias=True),
    "experts": replace(
        LLAMA, n_experts=6, experts_per_token=2, router_aux_loss_coef=0.01, hidden_dim=128
    ),
    "narrow heads": replace(LLAMA, dim=48, head_dim=12, hidden_dim=96),
    "seven heads to a kv head": replace(LLAMA, dim=448, n_heads=7, n_kv_heads=1),
}
LENGTHS = (50, 9, 120, 33, 1)


def model_of(
    config: ModelConfig,
    parallel: Parallel,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rounded: torch.dtype | None = None,
) -> Transformer:
    """This rank's part of a model whose weights follow from the seed alone.

    rounded: a dtype that its fp32 weights are numbers of.
    """
    table = tensor_table(config)
    replicas = parallel.replicas(table["layers.0.attention.wk.weight"].copies(parallel.mp_size))
    model = build(config, parallel.mp_rank, parallel.mp_size, dtype, replicas)
    model.stack_projections(parallel.device)
    with torch.no_grad():
        for name, spec in table.items():
            whole = random_tensor(name, spec, initial_std(name, spec, config.n_layers), seed)
            local = spec.cut(whole, parallel.mp_rank, parallel.mp_size)
            put(model, name, local.to(rounded or dtype).to(dtype), parallel.device)
    return model.eval()


def made_prompt(i: int, length: int) -> list[int]:
    return [1 + (7 * i * j + j + 11 * i) % (VOCABULARY - 10) for j in range(length)]


def batch_on(device: torch.device) -> Batch:
    """Rows of several lengths, a third of each prompt."""
    rows = [Sequence(made_prompt(i, n + 1), n // 3 + 1) for i, n in enumerate(LENGTHS, 1)]
    return Batch.of(rows, device)


def apart(ours: Tensor, wanted: Tensor) -> float:
    """‖ours − wanted‖ / ‖wanted‖; a NaN stays one, and is at most nothing."""
    ours, wanted = ours.detach().double().cpu(), wanted.detach().double().cpu()
    assert ours.shape == wanted.shape
    return float((ours - wanted).norm() / wanted.norm().clamp_min(1e-12))
