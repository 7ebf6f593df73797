"""Which operations activation checkpointing does again in backward, counted as they are called."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.models.batch import Batch, Sequence, response_loss
from src.models.config import ModelConfig
from src.models.transformer import KEPT, build


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.of[op.name()] += 1
        return op(*args, **(kwargs or {}))


def calls_of_a_step(recompute: str) -> Counter[str]:
    config = ModelConfig(16, 2, 2, 2, 8, 32, 20, max_seq_len=16)
    model = build(config, 0, 1, torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    model.recompute = recompute
    batch = Batch.of([Sequence([1, 5, 9, 3, 2], 2), Sequence([1, 4, 2], 1)], "cpu")
    with Calls() as calls:
        response_loss(model, batch, lambda logprobs, *_: -logprobs.sum()).backward()
    return calls.of


@pytest.mark.usefixtures("parallel")
def test_selective_recomputes_no_product_and_no_attention():
    once, selective, full = (calls_of_a_step(how) for how in ("none", "selective", "full"))
    called = KEPT & set(once)
    assert {"aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= called
    for name in called:
        assert once[name] == selective[name] < full[name], name
    assert sum(once.values()) < sum(selective.values()), "the rest is done again"


def test_what_is_kept_exists():
    from torch.nn.attention import varlen  # noqa: F401  # which adds the GPU's kernel

    for name in KEPT:
        namespace, operation = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), operation), name
