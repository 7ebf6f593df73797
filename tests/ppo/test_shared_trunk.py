"""Roles that are adapters on one frozen trunk.

The same numbers as roles with weights of their own, without copies.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.ppo.worker import TEMPERATURE
from tests.trainer.tiny import apart, padded, some_sequences, theirs

TOLERANCE = 1e-5
NAMES = ("policy", "reference", "value", "reward")
KINDS = ("separate", "shared", "shared, offloaded")


@pytest.fixture(params=["one rank", "TP 2", "DP 2"])
def found(results, request):
    return {kind: results[request.param][kind] for kind in KINDS}


def merged(folder, role: str):
    """transformers' model with the adapter's product added in, by PEFT's formula.

    W + alpha / r · B A.
    """
    scored = role != "policy"
    factors = load_file(folder / f"{role} adapter" / "adapter_model.safetensors")
    weights = theirs(folder / "policy").state_dict()
    model = theirs(folder / "value") if scored else theirs(folder / "policy")
    state = model.state_dict()
    for name in state:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if name == "score.weight":
            state[name] = factors["base_model.model.score.weight"]
        elif f"{stem}.lora_A.weight" in factors:
            state[name] = (
                weights[name]
                + 4.0 / 3 * factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
            )
        else:
            state[name] = weights[name]
    model.load_state_dict(state)
    return model


@torch.no_grad()
def expected(folder, name: str) -> torch.Tensor:
    """As `worker.outputs` has it, by transformers' models."""
    rows = some_sequences(5, seed=2)
    ids, mask = padded([s.tokens for s in rows])
    at = [(i, t) for i, s in enumerate(rows) for t in range(s.prompt_length, len(s.tokens))]
    if name in ("policy", "reference"):
        model = merged(folder, "policy") if name == "policy" else theirs(folder / "policy")
        logp = (model(input_ids=ids, attention_mask=mask).logits / TEMPERATURE).log_softmax(-1)
        return torch.stack([logp[i, t - 1, rows[i].tokens[t]] for i, t in at])
    model = merged(folder, {"value": "value", "reward": "verifier"}[name])
    scores = model.score(model.model(input_ids=ids, attention_mask=mask).last_hidden_state).squeeze(
        -1
    )
    ends = torch.stack([scores[i, len(s.tokens) - 1] for i, s in enumerate(rows)])
    return (
        ends
        if name == "reward"
        else torch.cat([torch.stack([scores[i, t - 1] for i, t in at]), ends])
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_role_on_the_trunk_is_the_merged_model_of_its_own(folder, found, name):
    """The reference is the policy without its adapter.

    Value and reward are the trunk with their own adapters added in.
    """
    want = expected(folder, name)
    for kind in KINDS:
        assert torch.allclose(found[kind]["before"][name], want, rtol=TOLERANCE, atol=TOLERANCE), (
            kind
        )
    others = [expected(folder, other) for other in NAMES if other != name]
    assert all(len(x) != len(want) or (x - want).abs().max() > 0.01 for x in others), (
        "roles that are too alike to tell"
    )


def test_the_roles_hold_the_trunk_s_own_tensors(found):
    """All that the reference has lies in the policy.

    Of value and reward all but adapter and head.
    """
    places = found["shared"]["places"]
    assert places["reference"] < places["policy"]
    adapters = 2 * 7 * 2  # two factors of seven matrices in two layers
    for name in ("value", "reward"):
        assert len(places[name] - places["policy"]) == adapters + 1
        assert len(places[name] & places["policy"]) == len(places["policy"]) - adapters - 1, (
            "all but adapter and output"
        )
    assert not places["value"] & places["reward"] - places["policy"]
    separate = found["separate"]["places"]
    assert all(not separate[a] & separate[b] for a in NAMES for b in NAMES if a < b)


def test_only_adapters_and_heads_are_trained(found):
    for kind in KINDS:
        trained = found[kind]["trained"]
        assert not trained["reference"] and not trained["reward"]
        assert all(".lora_" in n for n in trained["policy"]) and len(trained["policy"]) == 2 * 7 * 2
        assert {n for n in trained["value"] if ".lora_" not in n} == {"score.weight"}
        assert len(trained["value"]) == 2 * 7 * 2 + 1


def test_training_leaves_the_frozen_roles_as_they_were(found):
    """To the last bit; and moves the others."""
    for kind in KINDS:
        before, after = found[kind]["before"], found[kind]["after"]
        assert all(torch.equal(before[name], after[name]) for name in ("reference", "reward"))
        assert all((before[name] - after[name]).abs().max() > 0.01 for name in ("policy", "value"))


def test_an_iteration_on_a_shared_trunk_is_the_one_with_separate_roles(found):
    want = found["separate"]
    for kind in KINDS[1:]:
        got = found[kind]
        for a, b in zip(got["rollouts"], want["rollouts"]):
            assert a["response"] == b["response"]
            for name in (
                "score",
                "logprobs",
                "ref_logprobs",
                "values",
                "rewards",
                "advantages",
                "returns",
            ):
                assert a[name] == pytest.approx(b[name], rel=TOLERANCE, abs=TOLERANCE), name
        for name in (
            "policy_loss",
            "value_loss",
            "kl",
            "policy_grad_norm",
            "value_grad_norm",
            "approxkl",
        ):
            assert got["stats"][name] == pytest.approx(want["stats"][name], rel=1e-5, abs=1e-6), (
                name
            )
        assert all(apart(got[role], want[role]) < 1e-6 for role in ("policy", "value"))
    assert found["shared"]["digests"] == found["shared, offloaded"]["digests"]


def test_every_division_comes_to_the_same(results):
    for layout in ("TP 2", "DP 2"):
        for role in ("policy", "value"):
            assert (
                apart(results[layout]["shared"][role], results["one rank"]["shared"][role])
                < TOLERANCE
            )


def test_what_is_shared_is_held_once(found):
    """The reference weighs nothing, the reward model its adapter and head."""
    shared, separate = found["shared"]["peak"], found["separate"]["peak"]
    assert shared["reference"] == 0 and shared["policy"] == separate["policy"]
    assert 0 < shared["reward"] < separate["reward"] / 2 and shared["value"] < separate["value"]
    assert found["shared, offloaded"]["peak"]["policy"] <= shared["policy"]
