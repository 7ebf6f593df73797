"""The pure functions of PPO against loops over plain numbers, written from the papers. Numbers: lines of docs/ppo.md."""

import math

import numpy as np
import pytest
import torch

from src.ppo.advantages import gae, token_rewards, whiten
from src.ppo.loss import policy_loss, value_loss
from src.ppo.trainer import KLController

LENGTHS = [5, 1, 3, 4]
ROWS, LONGEST = len(LENGTHS), 5
MASK = torch.tensor([[t < n for t in range(LONGEST)] for n in LENGTHS])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def nan_where_masked(x: torch.Tensor) -> torch.Tensor:
    return torch.where(MASK, x, torch.nan)


# --- rewards and advantages ---------------------------------------------------------------------------------------


def test_line_17_the_kl_penalty_is_at_every_token_and_the_score_at_the_last():
    scores, kl = noise(ROWS), noise(ROWS, LONGEST, seed=1)
    got = token_rewards(scores, kl, MASK, 0.3).numpy()
    for b, n in enumerate(LENGTHS):
        want = [-0.3 * float(kl[b, t]) + (float(scores[b]) if t == n - 1 else 0.0) for t in range(n)]
        assert got[b, :n] == pytest.approx(want, rel=1e-6)
        assert not got[b, n:].any()


def test_line_28_a_score_of_zero_leaves_the_penalty_alone():
    kl = noise(ROWS, LONGEST)
    assert torch.equal(token_rewards(torch.zeros(ROWS), kl, MASK, 0.3), torch.where(MASK, -0.3 * kl, 0.0))


def loop_gae(rewards, values, bootstrap, gamma, lam):
    """Equation 16: A_t = sum over l of (gamma lam)^l delta_{t+l}, with V after the last token given."""
    n = len(rewards)
    following = [*values[1:], bootstrap]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_discounted_sum_of_temporal_differences(gamma, lam):
    rewards, values, bootstrap = noise(ROWS, LONGEST), noise(ROWS, LONGEST, seed=1), noise(ROWS, seed=2)
    advantages, returns = gae(rewards, values, MASK, bootstrap, gamma, lam)
    for b, n in enumerate(LENGTHS):
        want = loop_gae(rewards[b, :n].tolist(), values[b, :n].tolist(), float(bootstrap[b]), gamma, lam)
        assert advantages[b, :n].tolist() == pytest.approx(want, rel=1e-5, abs=1e-6)
        assert returns[b, :n].tolist() == pytest.approx([a + float(values[b, t]) for t, a in enumerate(want)], rel=1e-5, abs=1e-6)
        assert not advantages[b, n:].any() and not returns[b, n:].any()


def test_with_lambda_one_returns_are_discounted_rewards_to_go():
    rewards, values = noise(1, 4), noise(1, 4, seed=1)
    _, returns = gae(rewards, values, torch.ones(1, 4, dtype=torch.bool), torch.tensor([2.0]), 0.9, 1.0)
    want = [sum(0.9 ** (k - t) * float(rewards[0, k]) for k in range(t, 4)) + 0.9 ** (4 - t) * 2.0 for t in range(4)]
    assert returns[0].tolist() == pytest.approx(want, rel=1e-5)


def test_line_12_masked_positions_cannot_change_anything_not_even_nan():
    rewards, values, kl = noise(ROWS, LONGEST), noise(ROWS, LONGEST, seed=1), noise(ROWS, LONGEST, seed=2)
    scores, bootstrap = noise(ROWS, seed=3), noise(ROWS, seed=4)
    assert torch.equal(token_rewards(scores, nan_where_masked(kl), MASK, 0.3), token_rewards(scores, kl, MASK, 0.3))
    clean = gae(rewards, values, MASK, bootstrap, 0.9, 0.8)
    for dirty in (gae(nan_where_masked(rewards), values, MASK, bootstrap, 0.9, 0.8),
                  gae(rewards, nan_where_masked(values), MASK, bootstrap, 0.9, 0.8)):
        assert torch.equal(dirty[0], clean[0]) and torch.equal(dirty[1], clean[1])


def test_line_6_advantages_do_not_depend_on_padding_or_neighbours():
    rewards, values, bootstrap = noise(ROWS, LONGEST), noise(ROWS, LONGEST, seed=1), noise(ROWS, seed=2)
    together, _ = gae(rewards, values, MASK, bootstrap, 0.9, 0.8)
    for b, n in enumerate(LENGTHS):
        alone, _ = gae(rewards[b : b + 1, :n], values[b : b + 1, :n], MASK[b : b + 1, :n], bootstrap[b : b + 1], 0.9, 0.8)
        assert torch.equal(alone[0], together[b, :n])
        scored = token_rewards(rewards[b : b + 1, 0], values[b : b + 1, :n], MASK[b : b + 1, :n], 0.1)
        assert torch.equal(scored[0], token_rewards(rewards[:, 0], values, MASK, 0.1)[b, :n])


def test_line_14_whitening_centres_and_scales():
    x = noise(50) * 3 + 7
    values = x.tolist()
    mean = sum(values) / 50
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / 50)
    assert whiten(x).tolist() == pytest.approx([(v - mean) / std for v in values], abs=1e-5)
    far = noise(50) * 1e-2 + 1e4  # centred in fp64: no digits are lost to the mean
    assert float(whiten(far).std(correction=0)) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("x", [[3.0], [0.0, 0.0, 0.0], [0.1] * 7])
def test_line_15_zero_variance_gives_zeros(x):
    assert whiten(torch.tensor(x)).abs().max() < 1e-3


# --- losses -------------------------------------------------------------------------------------------------------


def test_the_policy_loss_is_the_clipped_surrogate():
    new, old, advantages = noise(40), noise(40, seed=1), noise(40, seed=2)
    loss, stats = policy_loss(new, old, advantages, 0.2, denominator=64)
    total = kl = clipped = 0.0
    for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist()):
        ratio = math.exp(n - o)
        bounded = min(max(ratio, 0.8), 1.2)
        total += -min(a * ratio, a * bounded)
        kl += ratio - 1 - (n - o)
        clipped += a * bounded < a * ratio
    assert 0 < clipped < 40
    assert float(loss) == pytest.approx(total / 64, rel=1e-5)
    assert float(stats["approxkl"]) == pytest.approx(kl / 64, rel=1e-5)
    assert float(stats["clipfrac"]) == pytest.approx(clipped / 64)


def test_the_policy_loss_pushes_only_what_is_not_clipped():
    """d loss / d log-prob = -A · ratio inside the range or against the clip, 0 beyond it in the advantage's direction."""
    ratios = torch.tensor([1.0, 1.1, 1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, 2.0, -2.0])
    new = ratios.log().requires_grad_()
    policy_loss(new, torch.zeros(6), advantages, 0.2, denominator=1)[0].backward()
    assert new.grad.tolist() == pytest.approx([-2.0, -2.2, 0.0, 3.0, -1.0, 0.0], abs=1e-5)


def test_line_18_the_log_ratio_is_clipped_before_exp():
    new = torch.tensor([200.0, -200.0, 0.0], requires_grad=True)
    loss, stats = policy_loss(new, torch.zeros(3), torch.tensor([-1.0, 1.0, 1.0]), 0.2, denominator=3)
    loss.backward()
    assert all(torch.isfinite(x).all() for x in (loss, new.grad, *stats.values()))


def test_line_19_the_value_loss_takes_the_worse_of_clipped_and_not():
    values, old, returns = noise(40), noise(40, seed=1), noise(40, seed=2)
    loss, stats = value_loss(values, old, returns, 0.2, denominator=64)
    total = clipped = 0.0
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist()):
        bounded = (o + min(max(v - o, -0.2), 0.2) - r) ** 2
        total += 0.5 * max((v - r) ** 2, bounded)
        clipped += bounded > (v - r) ** 2
    assert 0 < clipped < 40
    assert float(loss) == pytest.approx(total / 64, rel=1e-5)
    assert float(stats["value_clipfrac"]) == pytest.approx(clipped / 64)


def test_line_13_losses_add_up_however_the_tokens_are_cut():
    new, old, advantages = noise(40), noise(40, seed=1), noise(40, seed=2)
    for loss in (policy_loss, value_loss):
        whole, stats = loss(new, old, advantages, 0.2, 40)
        parts = [loss(new[a:b], old[a:b], advantages[a:b], 0.2, 40) for a, b in ((0, 3), (3, 30), (30, 40))]
        assert float(sum(part for part, _ in parts)) == pytest.approx(float(whole), rel=1e-5)
        for name in stats:
            assert float(sum(s[name] for _, s in parts)) == pytest.approx(float(stats[name]), rel=1e-5)


# --- the KL controller --------------------------------------------------------------------------------------------


def test_line_20_the_controller_follows_ziegler():
    controller, coefficient = KLController(0.1, target=6.0, horizon=1000.0), 0.1
    for kl, n in [(3.0, 64), (9.0, 64), (6.5, 32), (-1.0, 64), (6.0, 64)]:
        controller.update(kl, n)
        coefficient *= 1 + float(np.clip(kl / 6.0 - 1, -0.2, 0.2)) * n / 1000.0
        assert controller.kl_coef == pytest.approx(coefficient, rel=1e-12)


def test_without_a_target_the_coefficient_is_fixed():
    controller = KLController(0.1)
    controller.update(100.0, 64)
    assert controller.kl_coef == 0.1
