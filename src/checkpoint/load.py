"""A checkpoint's slices into this rank's model."""

import torch

from src.checkpoint.source import Checkpoint
from src.models.init import random_tensor
from src.models.layout import TensorSpec, check_degree
from src.models.transformer import Transformer, build
from src.parallel.setup import Parallel, agreed


@torch.no_grad()
def load_model(
    checkpoint: Checkpoint, parallel: Parallel, dtype: torch.dtype, head: str | None = None, seed: int = 0
) -> Transformer:
    """This rank's model with the checkpoint's weights.

    head "score" on a language model's checkpoint leaves `output` aside and starts the scalar head from N(0, 1/(dim + 1))
    (N Implementation Details of RLHF with PPO); every other weight must come from the checkpoint. Raises UserError, on every
    rank, when one is not finite.
    """
    config = checkpoint.config.with_head(head or checkpoint.config.head)
    if config.head == "lm" and checkpoint.config.head == "score":
        raise ValueError(f"{checkpoint.folder} has a score head and no output layer")
    check_degree(config, parallel.mp_size)
    model = build(config, parallel.device, dtype)

    def fill() -> None:
        for name, parameter in model.named_parameters():
            if name == "score.weight" and checkpoint.config.head == "lm":
                parameter.copy_(random_tensor(name, TensorSpec((1, config.dim)), (config.dim + 1) ** -0.5, seed))
            else:
                local = checkpoint.local(name, parallel.mp_rank, parallel.mp_size)
                parameter.copy_(checkpoint.check_finite(name, local))

    agreed(fill)
    return model
