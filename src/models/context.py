"""A batch whose tokens several ranks divide: where a rank's tokens lie, and how they attend."""

import torch
from torch import Tensor

from src.errors import UserError
from src.models.attention import Packed
from src.models.config import ModelConfig
from src.models.layout import layer_table
from src.parallel.context import Share, repeats_of


class Divided:
    """The layout of a rank's share of the tokens of a `Packed`.

    Attention is that of the whole, on this rank's share of the heads.
    """

    fuses, is_whole = False, True
    balance_loss: Tensor | None = None

    def __init__(self, whole: Packed, share: Share) -> None:
        self.whole, self.share = whole, share
        self.context, self.positions = whole.context, share.of(whole.positions)

    @property
    def prompt_lengths(self) -> Tensor:
        return self.share.of(self.whole.prompt_lengths)

    def means(self, x: Tensor) -> Tensor:
        """Each sequence's mean over its tokens, on all ranks alike: [m, …] → [sequences, …]."""
        return self.share.summed(self.whole.means(self.share.placed(x)))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        """`Packed.attend` for this rank's tokens: [m, heads, head_dim] each → like q."""
        share, ranks = self.share, self.share.size
        repeats = repeats_of(k.size(1), ranks)
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        # One exchange for all three: [ranks, m, heads / ranks, head_dim] each, side by side.
        parts = [x.unflatten(1, (ranks, -1)).transpose(0, 1) for x in (q, k, v)]
        qkv = share.by_heads(torch.cat(parts, 2))
        q, k, v = qkv.split([x.size(2) for x in parts], 1)
        return share.by_tokens(self.whole.attend(layer, q, k, v, window))


def check_heads(
    config: ModelConfig, tensor_ranks: int, context_ranks: int, role: str = "model"
) -> None:
    """Raise UserError where ranks that divide the tokens could not divide the heads.

    tensor_ranks: those of the role, by --model_parallel_size; context_ranks:
    --context_parallel_size.
    """
    heads = layer_table(config)["attention.wq.weight"].local_shape(tensor_ranks)[0]
    heads //= config.head_dim
    if heads % context_ranks:
        raise UserError(
            f"--context_parallel_size {context_ranks}: does not divide the {heads} query heads "
            f"that a rank has of the {role} ({config.n_heads} at --model_parallel_size "
            f"{tensor_ranks}); give a divisor of {heads}, or another --model_parallel_size"
        )
