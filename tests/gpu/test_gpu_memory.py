"""Quantised weights as on the CPU; offloaded roles as they were."""

import pytest
import torch
import torch.nn.functional as F

from src.models.quantize import KINDS, dense, quantized
from src.ppo.roles import Role, Stage
from src.trainer.optimizer import Optimizer
from tests.gpu.models import CPU, LLAMA, apart, model_of
from tests.gpu.test_gpu_models import loss_of


@pytest.mark.parametrize("rows", (1, 5, 300))
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights(device, kind, rows):
    generator = torch.Generator().manual_seed(2)
    w, x, up = (torch.randn(n, 192, generator=generator).bfloat16() for n in (96, rows, rows))
    up = up[:, :96].contiguous()
    ours, theirs = (quantized(w.to(where), kind) for where in (device, CPU))
    assert apart(dense(ours), dense(theirs)) <= 1e-6
    x_ours = x.to(device, copy=True).requires_grad_()
    out = F.linear(x_ours, ours)
    out.backward(up.to(device))
    exact = dense(theirs).float()
    assert apart(out, x.float() @ exact.t()) <= 1e-2
    assert apart(x_ours.grad, up.float() @ exact) <= 1e-2


def test_a_role_comes_back_bit_for_bit(device, parallel):
    model = model_of(LLAMA, parallel, torch.bfloat16)
    optimizer = Optimizer(model, parallel)
    optimizer.backward(loss_of(model, device), last=True)
    optimizer.step(1e-3)
    role = Role("policy", model, parallel, optimizer)
    before = [x.detach().clone() for x in role.weights() + role.state()]
    stage = Stage(True, device)
    stage.add(role)
    stage.add(Role("reference", model_of(LLAMA, parallel, torch.bfloat16, seed=1), parallel))
    for _ in range(2):
        with stage.at_work("reference"):
            assert not any(x.untyped_storage().nbytes() for x in role.weights() + role.state())
        with stage.at_work("policy", training=True):
            after = role.weights() + role.state()
            assert all(x.device.type == device.type for x in after)
            assert all(map(torch.equal, before, after))
