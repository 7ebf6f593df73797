"""Which operations activation checkpointing does again in backward, counted as they are called."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.checkpoint.load import put
from src.models.attention import Packed
from src.models.batch import Batch, Sequence, response_loss
from src.models.config import ModelConfig
from src.models.lora import LoRAConfig, add_lora
from src.models.transformer import KEPT, build

LORA = LoRAConfig(2)


class Calls(TorchDispatchMode):
    """How often each operation is called, and the bytes of what those make that are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.of[op.name()] += 1
        out = op(*args, **(kwargs or {}))
        if op.name() in KEPT:
            self.bytes += sum(x.nbytes for x in (out if isinstance(out, tuple) else (out,)))
        return out


def model_for(parallel, lora=None, **sizes):
    config = ModelConfig(16, 2, 2, 2, 8, 32, 20, max_seq_len=16, **sizes)
    model = build(config, 0, 1, torch.float32)
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    model.stack_projections(device)
    with torch.no_grad():
        for name, weight in list(model.named_parameters()):
            put(model, name, 0.1 * torch.randn(weight.shape, generator=generator), device)
    if lora is not None:
        add_lora(model, lora, 0, parallel)
    return model


def calls_of_a_step(model, recompute: str) -> Counter[str]:
    model.recompute = recompute
    batch = Batch.of([Sequence([1, 5, 9, 3, 2], 2), Sequence([1, 4, 2], 1)], "cpu")
    with Calls() as calls:
        response_loss(model, batch, lambda logprobs, *_: -logprobs.sum()).backward()
    return calls.of


ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
EXPERTS = dict(n_experts=4, experts_per_token=2)
MODELS = {  # an adapter, the model's sizes, and what there is to keep
    "dense": (None, {}, {"aten::mm", ATTENTION}),
    "adapters": (LORA, {}, {"rlhf::adapted_linear", ATTENTION}),
    "experts": (None, EXPERTS, {"aten::mm", "aten::_grouped_mm", ATTENTION}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_selective_recomputes_no_product_and_no_attention(kind, parallel):
    lora, sizes, dear = MODELS[kind]
    model = model_for(parallel, lora, **sizes)
    once, selective, full = (calls_of_a_step(model, how) for how in ("none", "selective", "full"))
    called = KEPT & set(once)
    assert dear <= called
    for name in called:
        assert once[name] == selective[name] <= full[name], name
    assert all(selective[name] < full[name] for name in dear)
    assert sum(once.values()) < sum(selective.values()), "the rest is done again"


def test_an_adapter_makes_nothing_wide_that_is_kept(parallel):
    """Beside the layers' outputs, and those once, there are only its products of its rank."""
    tokens, config = torch.tensor([1, 5, 9, 3, 2]), None
    made = {}
    for name, lora in (("plain", None), ("adapted", LORA)):
        model = model_for(parallel, lora)
        model.recompute, config = "selective", model.config
        with Calls() as calls:
            model(tokens, Packed([5]))
        made[name] = calls.bytes
    adapters = 7 * config.n_layers  # wq, wk, wv, wo, w1, w2, w3
    assert made["adapted"] - made["plain"] == 5 * LORA.rank * adapters * 4


def test_what_is_kept_exists():
    from torch.nn.attention import varlen  # noqa: F401  # which adds the GPU's kernel

    for name in KEPT:
        namespace, operation = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), operation), name
