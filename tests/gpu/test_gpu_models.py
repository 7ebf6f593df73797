"""Losses and gradients of every mechanism, the optimizer, and what is computed again."""

import pytest
import torch

from src.models import elementwise
from src.models.batch import response_loss
from src.models.lora import LoRAConfig, add_lora
from src.trainer.optimizer import Optimizer
from tests.gpu.models import LLAMA, MODELS, apart, batch_on, model_of

# Where two experts are about as likely, rounding decides which of them a token goes to.
LIMITS = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
EXPERTS_LIMIT = 0.15


def loss_of(model, device):
    batch = batch_on(device)
    total = response_loss(model, batch, lambda logprobs, entropy, rows: -logprobs.sum())
    return total / len(batch.targets)


def gradients(model, device):
    """The loss and the gradient of each weight, fp32."""
    model.train()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for weight in weights.values():
        weight.grad_dtype = torch.float32
    loss = loss_of(model, device)
    loss.backward()
    return {"loss": loss, **{name: p.grad for name, p in weights.items()}}


def compare(ours, wanted, limit):
    assert ours.keys() == wanted.keys()
    errors = {name: apart(ours[name], wanted[name]) for name in wanted if "gate" not in name}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= limit, (worst, errors[worst])


@pytest.mark.parametrize("dtype", LIMITS, ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients(device, parallel, cpu, name, dtype):
    config = MODELS[name]
    ours = gradients(model_of(config, parallel, dtype), device)
    wanted = gradients(model_of(config, cpu, rounded=dtype), cpu.device)
    limit = EXPERTS_LIMIT if config.n_experts and dtype == torch.bfloat16 else LIMITS[dtype]
    compare(ours, wanted, limit)


@pytest.mark.parametrize("recompute", ("selective", "full"))
@pytest.mark.parametrize("name", ("llama", "experts"))
def test_what_is_computed_again_is_the_same(device, parallel, name, recompute):
    kept, again = (model_of(MODELS[name], parallel, torch.bfloat16) for _ in range(2))
    again.recompute = recompute
    compare(gradients(again, device), gradients(kept, device), 2e-2)


@pytest.mark.parametrize("recompute", ("none", "selective"))
@pytest.mark.parametrize(
    "dtype, limit", ((torch.float32, 2e-3), (torch.bfloat16, 0.25)), ids=("fp32", "bf16")
)
def test_gradients_of_an_adapter(device, parallel, cpu, dtype, limit, recompute):
    """In bf16 the factors' few numbers are far apart, on the CPU too."""

    def adapted(parallel, dtype):
        model = model_of(LLAMA, parallel, dtype, rounded=torch.bfloat16)
        add_lora(model, LoRAConfig(4), 0, parallel)
        with torch.no_grad():  # B is zero at first, and A would have no gradient
            for name, weight in model.named_parameters():
                if name.endswith("lora_b"):
                    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
                    weight.copy_(0.1 * noise.bfloat16())
        return model

    ours = adapted(parallel, dtype)
    ours.recompute = recompute
    wanted = gradients(adapted(cpu, torch.float32), cpu.device)
    compare(gradients(ours, device), wanted, limit)


def test_compiled_elementwise_gives_the_same(device, parallel, monkeypatch):
    if device.type == "cpu":
        pytest.skip("compiling for a CPU takes a minute; tests/models covers it")
    plain = gradients(model_of(LLAMA, parallel, torch.bfloat16), device)
    monkeypatch.setattr(elementwise, "_compiled", {})
    elementwise.compile_elementwise()
    compare(gradients(model_of(LLAMA, parallel, torch.bfloat16), device), plain, 2e-2)


def test_clipped_steps_of_the_optimizer(device, parallel, cpu):
    def trained(parallel):
        model = model_of(LLAMA, parallel).train()
        optimizer = Optimizer(model, parallel, 0.1, 0.5)
        for _ in range(3):
            optimizer.backward(loss_of(model, parallel.device), last=True)
            optimizer.step(1e-3)
        return torch.cat([weight.detach().flatten().cpu() for weight in model.parameters()])

    untrained = torch.cat([w.detach().flatten() for w in model_of(LLAMA, cpu).parameters()])
    ours, wanted = trained(parallel), trained(cpu)
    # of what the steps changed: the weights themselves would hide it
    assert apart(ours - untrained, wanted - untrained) <= 1e-2
