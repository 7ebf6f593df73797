"""Where the roles' tensors lie, and the reference that follows the policy."""

import pytest
import torch

from src.checkpoint.load import load_model, load_sharing
from src.checkpoint.source import Checkpoint
from src.models.lora import LoRAConfig
from src.models.quantize import Quantized
from src.ppo.roles import MovingReference, Role, Stage
from src.trainer.averages import Method
from src.trainer.optimizer import Optimizer
from tests.ppo.worker import LR, VALUE_LR, digest, make_ppo, prompts, whole
from tests.trainer.tiny import ours


def lying(ppo) -> dict[str, tuple[int, int]]:
    """Bytes of each role's weights and of its optimizer's state that are on the device."""

    def size(tensors):
        return sum(
            {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values()
        )

    return {
        name: (size(role.weights()), size(role.state())) for name, role in ppo.stage.roles.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_leaves_nothing_of_the_others_on_the_device(folder, parallel, dtype):
    """In each phase only those at work.

    Optimizers' state, masters of bf16 weights included, only in the update.
    """
    ppo, seen = make_ppo(folder, parallel, dtype, offload=True, update="in_turn", ppo_epochs=1), {}
    assert all(sizes == (0, 0) for sizes in lying(ppo).values()), (
        "to host memory as soon as they are loaded"
    )

    def watching(name, real):
        def call(*arguments, **more):
            seen.setdefault(name, []).append(lying(ppo))
            return real(*arguments, **more)

        return call

    ppo.rollouts.engine.generate = watching("generate", ppo.rollouts.engine.generate)
    for name in ("_values", "_policy_loss", "_value_loss"):
        setattr(ppo, name, watching(name, getattr(ppo, name)))
    verifier = watching("reward", ppo.rollouts.rewards[0][1])
    verifier.name = "verifier"
    ppo.rollouts.rewards = [(1.0, verifier)]
    for number in (0, 1):
        ppo.iteration(number, prompts(), LR, VALUE_LR)
    at_work = {
        "generate": ("policy", 0),
        "reward": ("reward", 0),
        "_values": ("value", 0),
        "_policy_loss": ("policy", 1),
        "_value_loss": ("value", 1),
    }
    for phase, (name, training) in at_work.items():
        for sizes in seen[phase]:
            assert [role for role, (weights, _) in sizes.items() if weights] == [name], phase
            assert all(
                not state or training and role == name for role, (_, state) in sizes.items()
            ), phase
        if training:
            assert seen[phase][-1][name][1] > seen[phase][-1][name][0], "moments, and masters"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [{"offload": True}, {"update": "in_turn"}, {"offload": True, "update": "in_turn"}]
)
def test_offload_and_the_order_of_updates_change_no_bit(folder, parallel, dtype, change):
    found = []
    for more in ({}, change):
        ppo = make_ppo(folder, parallel, dtype, ppo_epochs=1, **more)
        stats = [ppo.iteration(number, prompts(), LR, VALUE_LR) for number in (0, 1)][-1]
        timeless = {
            k: x
            for k, x in stats.items()
            if not k.startswith(("seconds", "tokens_per_s", "memory"))
        }
        found.append((digest(ppo), timeless))
    assert found[0] == found[1]


def test_the_peak_of_a_role_is_its_weights_gradients_and_optimizer(folder, parallel):
    """fp32: weights, two moments and gradients alike, a step counter of 4 bytes per tensor.

    Frozen: the weights alone.
    """
    peaks = []
    for change in ({}, {"offload": True, "update": "in_turn"}):
        ppo = make_ppo(folder, parallel, ppo_epochs=1, **change)
        stats = ppo.iteration(0, prompts(), LR, VALUE_LR)
        for name, role in ppo.stage.roles.items():
            tensors = list(role.model.parameters())
            weights = sum(p.numel() * 4 for p in tensors)
            want = weights * 4 + 4 * len(tensors) if role.optimizer else weights
            assert ppo.stage.peak[name] == want and stats[f"memory_gb/{name}"] == want / 1e9
        peaks.append(ppo.stage.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("spare", [0, 2**40])
def test_the_next_role_comes_back_while_there_is_room(folder, parallel, monkeypatch, spare):
    """Beside the one at work, and with the bits that it left with."""
    ppo = make_ppo(folder, parallel, offload=True, update="in_turn", ppo_epochs=1)
    plain = make_ppo(folder, parallel, update="in_turn", ppo_epochs=1)
    monkeypatch.setattr(ppo.stage.host, "spare", lambda: spare)
    here = []
    values = ppo._values

    def watching(*arguments):
        here.append({name for name, (weights, _) in lying(ppo).items() if weights})
        return values(*arguments)

    ppo._values = watching
    for number in (0, 1):
        for each in (ppo, plain):
            each.iteration(number, prompts(), LR, VALUE_LR)
    assert here[0] == {"value"}, "nobody knows yet who comes next"
    assert here[1] == ({"value", "policy"} if spare else {"value"})
    assert digest(ppo) == digest(plain)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_an_optimizer_s_state_in_host_memory_stays_there(folder, parallel, on_cpu):
    """While its role comes and goes; and the weights are those of a plain run."""
    method = Method(offload=True, on_cpu=on_cpu)
    moving = make_ppo(folder, parallel, offload=True, update="in_turn", ppo_epochs=1, method=method)
    plain = make_ppo(folder, parallel, update="in_turn", ppo_epochs=1)
    for number in (0, 1):
        for ppo in (moving, plain):
            ppo.iteration(number, prompts(), LR, VALUE_LR)
    role = moving.stage.roles["policy"]
    with moving.stage.at_work():
        assert all(x.untyped_storage().nbytes() == 0 for x in role.weights())
        state = role.optimizer.state_tensors()
        assert state and all(x.untyped_storage().nbytes() for x in state)
    for name in ("policy", "value"):
        weights = [whole(ppo, name) for ppo in (moving, plain)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_role_goes_and_comes_back(folder, parallel, kind):
    checkpoint, stage = Checkpoint.open(str(folder / "policy")), Stage(True, parallel.device)
    model = load_model(checkpoint, parallel, torch.float32, "lm", quantize=kind).requires_grad_(
        False
    )
    kept = {name: p.data for name, p in model.named_parameters() if isinstance(p.data, Quantized)}
    before = {name: (weight.codes.clone(), weight.scales.clone()) for name, weight in kept.items()}
    role = stage.add(Role("reference", model, parallel))
    assert before and all(x.untyped_storage().nbytes() == 0 for x in role.weights())
    with stage.at_work("reference"):
        for name, (codes, scales) in before.items():
            weight = model.get_parameter(name).data
            assert torch.equal(weight.codes, codes) and torch.equal(weight.scales, scales)
    with stage.at_work():
        assert all(x.untyped_storage().nbytes() == 0 for x in role.weights())


def test_a_shared_trunk_stays_while_one_of_its_roles_is_at_work(folder, parallel):
    lora, stage = LoRAConfig(4), Stage(True, parallel.device)
    policy = load_model(
        Checkpoint.open(str(folder / "policy")), parallel, torch.float32, "lm", lora=lora
    )
    reference = load_sharing(policy, parallel, "lm")
    value = load_sharing(policy, parallel, "score", lora=lora)
    for name, model in (("policy", policy), ("reference", reference), ("value", value)):
        stage.add(
            Role(name, model, parallel, None if name == "reference" else Optimizer(model, parallel))
        )
    trunk = reference.layers[0].attention.wq.weight
    adapters = [model.layers[0].attention.wq.lora_b for model in (policy, value)]
    for name, there in (
        ("reference", (False, False)),
        ("policy", (True, False)),
        ("value", (False, True)),
    ):
        with stage.at_work(name):
            assert trunk.untyped_storage().nbytes() > 0
            assert tuple(a.untyped_storage().nbytes() > 0 for a in adapters) == there
    assert stage.peak["reference"] == 0, "what is shared counts for the first role"
    with stage.at_work():
        assert trunk.untyped_storage().nbytes() == 0


# --- the moving reference -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", [False, True])
def test_the_reference_follows_the_policy_in_fp32(folder, parallel, dtype, offload):
    """reference ← 0.9 · reference + 0.1 · policy each iteration, from the loaded weights."""
    ppo = make_ppo(folder, parallel, dtype, offload=offload, ppo_epochs=1, ref_ema=0.9)
    want = {
        name: p.detach().float()
        for name, p in ours(folder / "reference", parallel, dtype).named_parameters()
    }
    for number in range(3):
        ppo.iteration(number, prompts(), LR, VALUE_LR)
        with ppo.stage.at_work("policy", "reference"):
            for name, p in ppo.policy.model.named_parameters():
                want[name] = 0.9 * want[name] + 0.1 * p.detach().float()
            digits = 1e-6 if dtype == torch.float32 else 2**-7  # one unit in the last place
            for name, p in ppo.reference.model.named_parameters():
                assert torch.allclose(p.detach(), want[name].to(dtype), rtol=digits, atol=1e-7), (
                    name
                )


def test_steps_too_small_for_bf16_add_up(folder, parallel):
    reference = ours(folder / "reference", parallel, torch.bfloat16).requires_grad_(False)
    policy = ours(folder / "policy", parallel, torch.bfloat16)
    follower = MovingReference(Role("reference", reference, parallel), 0.999)
    start = {name: p.detach().float() for name, p in reference.named_parameters()}
    for _ in range(300):
        follower.follow(Role("policy", policy, parallel))
    for name, p in policy.named_parameters():
        want = 0.999**300 * start[name] + (1 - 0.999**300) * p.detach().float()
        assert torch.allclose(reference.get_parameter(name).float(), want, rtol=1e-2, atol=1e-3), (
            name
        )


def test_the_reference_follows_the_policy_with_its_adapter_added_in(folder, parallel):
    policy = load_model(
        Checkpoint.open(str(folder / "policy")),
        parallel,
        torch.float32,
        "lm",
        lora=LoRAConfig(4, 8.0),
    )
    wq = policy.layers[0].attention.wq
    torch.nn.init.normal_(wq.lora_b, generator=torch.Generator().manual_seed(0))
    reference = ours(folder / "reference", parallel).requires_grad_(False)
    before = reference.layers[0].attention.wq.weight.clone()
    follower = MovingReference(Role("reference", reference, parallel), 0.5)
    follower.follow(Role("policy", policy, parallel))
    want = 0.5 * before + 0.5 * (wq.base.weight + 2.0 * wq.lora_b @ wq.lora_a)
    assert torch.allclose(reference.layers[0].attention.wq.weight, want, atol=1e-6)
