"""The pure functions of PPO against loops over plain numbers, written from the papers.

Numbers: lines of docs/ppo.md.
"""

import math

import numpy as np
import pytest
import torch

from src.ppo.advantages import Moments, gae, group_advantages, token_rewards, whiten
from src.ppo.kl import KLController
from src.ppo.loss import kl_loss, policy_loss, token_weights, value_loss

LENGTHS = [5, 1, 3, 4]
ROWS, LONGEST = len(LENGTHS), 5
MASK = torch.tensor([[t < n for t in range(LONGEST)] for n in LENGTHS])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def nan_where_masked(x: torch.Tensor) -> torch.Tensor:
    return torch.where(MASK, x, torch.nan)


# --- rewards and advantages -----------------------------------------------------------------------


def test_line_17_the_kl_penalty_is_at_every_token_and_the_score_at_the_last():
    scores, kl = noise(ROWS), noise(ROWS, LONGEST, seed=1)
    got = token_rewards(scores, kl, MASK, 0.3).numpy()
    for b, n in enumerate(LENGTHS):
        want = [
            -0.3 * float(kl[b, t]) + (float(scores[b]) if t == n - 1 else 0.0) for t in range(n)
        ]
        assert got[b, :n] == pytest.approx(want, rel=1e-6)
        assert not got[b, n:].any()


def test_line_28_a_score_of_zero_leaves_the_penalty_alone():
    kl = noise(ROWS, LONGEST)
    assert torch.equal(
        token_rewards(torch.zeros(ROWS), kl, MASK, 0.3), torch.where(MASK, -0.3 * kl, 0.0)
    )


def loop_gae(rewards, values, bootstrap, gamma, lam):
    """Equation 16.

    A_t = sum over l of (gamma lam)^l delta_{t+l}, with V after the last token given.
    """
    n = len(rewards)
    following = [*values[1:], bootstrap]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_discounted_sum_of_temporal_differences(gamma, lam):
    rewards, values, bootstrap = (
        noise(ROWS, LONGEST),
        noise(ROWS, LONGEST, seed=1),
        noise(ROWS, seed=2),
    )
    advantages, returns = gae(rewards, values, MASK, bootstrap, gamma, lam)
    for b, n in enumerate(LENGTHS):
        want = loop_gae(
            rewards[b, :n].tolist(), values[b, :n].tolist(), float(bootstrap[b]), gamma, lam
        )
        assert advantages[b, :n].tolist() == pytest.approx(want, rel=1e-5, abs=1e-6)
        sums = [a + float(values[b, t]) for t, a in enumerate(want)]
        assert returns[b, :n].tolist() == pytest.approx(sums, rel=1e-5, abs=1e-6)
        assert not advantages[b, n:].any() and not returns[b, n:].any()


def test_with_lambda_one_returns_are_discounted_rewards_to_go():
    rewards, values = noise(1, 4), noise(1, 4, seed=1)
    _, returns = gae(
        rewards, values, torch.ones(1, 4, dtype=torch.bool), torch.tensor([2.0]), 0.9, 1.0
    )
    want = [
        sum(0.9 ** (k - t) * float(rewards[0, k]) for k in range(t, 4)) + 0.9 ** (4 - t) * 2.0
        for t in range(4)
    ]
    assert returns[0].tolist() == pytest.approx(want, rel=1e-5)


def test_line_12_masked_positions_cannot_change_anything_not_even_nan():
    rewards, values, kl = (
        noise(ROWS, LONGEST),
        noise(ROWS, LONGEST, seed=1),
        noise(ROWS, LONGEST, seed=2),
    )
    scores, bootstrap = noise(ROWS, seed=3), noise(ROWS, seed=4)
    assert torch.equal(
        token_rewards(scores, nan_where_masked(kl), MASK, 0.3), token_rewards(scores, kl, MASK, 0.3)
    )
    clean = gae(rewards, values, MASK, bootstrap, 0.9, 0.8)
    for dirty in (
        gae(nan_where_masked(rewards), values, MASK, bootstrap, 0.9, 0.8),
        gae(rewards, nan_where_masked(values), MASK, bootstrap, 0.9, 0.8),
    ):
        assert torch.equal(dirty[0], clean[0]) and torch.equal(dirty[1], clean[1])


def test_line_6_advantages_do_not_depend_on_padding_or_neighbours():
    rewards, values, bootstrap = (
        noise(ROWS, LONGEST),
        noise(ROWS, LONGEST, seed=1),
        noise(ROWS, seed=2),
    )
    together, _ = gae(rewards, values, MASK, bootstrap, 0.9, 0.8)
    for b, n in enumerate(LENGTHS):
        alone, _ = gae(
            rewards[b : b + 1, :n],
            values[b : b + 1, :n],
            MASK[b : b + 1, :n],
            bootstrap[b : b + 1],
            0.9,
            0.8,
        )
        assert torch.equal(alone[0], together[b, :n])
        scored = token_rewards(
            rewards[b : b + 1, 0], values[b : b + 1, :n], MASK[b : b + 1, :n], 0.1
        )
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


# --- groups and running moments -------------------------------------------------------------------


def test_group_advantages_are_the_papers():
    """GRPO section 4.1.2: (r − mean) / std; Dr.

    GRPO: r − mean; RLOO equation 10: r − mean of the others.
    """
    rewards = noise(12).double() * 2 + 1
    rows = rewards.numpy().reshape(4, 3)
    want = {
        "grpo": [[(r - np.mean(row)) / (np.std(row) + 1e-6) for r in row] for row in rows],
        "dr_grpo": [[r - np.mean(row) for r in row] for row in rows],
        "rloo": [[r - np.mean(np.delete(row, i)) for i, r in enumerate(row)] for row in rows],
    }
    for kind, table in want.items():
        assert group_advantages(rewards, 3, kind).tolist() == pytest.approx(
            np.concatenate(table).tolist(), rel=1e-9
        ), kind
    assert group_advantages(torch.tensor([3.0, 1.0]), 2, "rloo").tolist() == [2.0, -2.0]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_line_15_a_group_of_equal_rewards_gives_zeros(kind):
    """Of numbers whose mean is not exact, too."""
    got = group_advantages(
        torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 3.0], dtype=torch.float64), 3, kind
    )
    assert got[:3].abs().max() < 1e-9 and got[3:].abs().max() > 0.5


def test_lines_22_23_running_moments_are_those_of_all_numbers_so_far():
    moments, batches = Moments(), [noise(n, seed=n).double() * 3 + 5 for n in (4, 1, 9, 30)]
    assert (moments.mean, moments.std) == (0.0, 1.0), "before the first batch nothing is changed"
    for i, batch in enumerate(batches):
        moments.update(batch)
        every = np.concatenate([b.numpy() for b in batches[: i + 1]])
        assert moments.mean == pytest.approx(
            every.mean(), rel=1e-9
        ) and moments.std == pytest.approx(every.std(), rel=1e-9)


def test_line_23_decay_forgets_without_leaning_towards_zero():
    """The first batch's moments are its own, whatever the decay; later ones are weighted means."""
    moments, batches = Moments(0.9), [noise(8, seed=i).double() + 10 * i + 5 for i in range(4)]
    for i, batch in enumerate(batches):
        moments.update(batch)
        every = np.concatenate([b.numpy() for b in batches[: i + 1]])
        weights = np.repeat([0.9 ** (i - j) for j in range(i + 1)], 8)
        mean = np.average(every, weights=weights)
        assert moments.mean == pytest.approx(mean, rel=1e-9)
        assert moments.std == pytest.approx(
            np.average((every - mean) ** 2, weights=weights) ** 0.5, rel=1e-6
        )


@pytest.mark.parametrize("x", [[0.1] * 7, [3.0], [1e4] * 3])
def test_line_15_equal_numbers_are_centred_and_not_blown_up(x):
    moments = Moments()
    moments.update(torch.tensor(x))
    assert (
        moments.std >= 1e-4
        and abs((torch.tensor(x).double() - moments.mean) / moments.std).max() < 1e-3
    )


def test_running_moments_go_on_from_their_sums():
    moments, other = Moments(0.9), Moments(0.9)
    moments.update(noise(5))
    other.sums = moments.sums
    for each in (moments, other):
        each.update(noise(3, seed=1))
    assert (moments.mean, moments.std) == (other.mean, other.std)


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("high, dual", [(None, None), (0.28, None), (None, 1.5), (0.28, 1.5)])
def test_the_policy_loss_is_the_clipped_surrogate(high, dual):
    """Also with another upper range (DAPO, equation 10) and a bound for A < 0.

    The bound is dual-clip PPO's, equation 5.
    """
    new, old, advantages = noise(200), noise(200, seed=1), noise(200, seed=2)
    loss, stats = policy_loss(new, old, advantages, 0.2, high, dual)
    assert loss.shape == (200,) and all(x.shape == (200,) for x in stats.values())
    clipped, bounds = 0, 0
    for i, (n, o, a) in enumerate(zip(new.tolist(), old.tolist(), advantages.tolist())):
        ratio = math.exp(n - o)
        bounded = min(max(ratio, 0.8), 1.2 if high is None else 1 + high)
        objective = min(a * ratio, a * bounded)
        here = a * bounded < a * ratio
        if dual is not None and a < 0 and objective < dual * a:
            objective, here, bounds = dual * a, True, bounds + 1
        clipped += here
        assert float(loss[i]) == pytest.approx(-objective, rel=1e-5, abs=1e-7)
        assert float(stats["approxkl"][i]) == pytest.approx(ratio - 1 - (n - o), rel=1e-4, abs=1e-6)
        assert float(stats["clipfrac"][i]) == here
    assert 0 < clipped < 200 and (bounds > 10) == (dual is not None)


@pytest.mark.parametrize(
    "options, want",
    [
        ((), [-2.0, -2.2, 0.0, 3.0, -1.0, 0.0]),
        ((0.6, None), [-2.0, -2.2, -3.0, 3.0, -1.0, 0.0]),
        ((None, 1.4), [-2.0, -2.2, 0.0, 0.0, -1.0, 0.0]),
    ],
)
def test_the_policy_loss_pushes_only_what_is_not_clipped(options, want):
    """d loss / d log-prob = -A · ratio inside the range or against the clip.

    It is 0 beyond it in the advantage's direction.
    """
    ratios = torch.tensor([1.0, 1.1, 1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, 2.0, -2.0])
    new = ratios.log().requires_grad_()
    policy_loss(new, torch.zeros(6), advantages, 0.2, *options)[0].sum().backward()
    assert new.grad.tolist() == pytest.approx(want, abs=1e-5)


def test_line_18_the_log_ratio_is_clipped_before_exp():
    new = torch.tensor([200.0, -200.0, 0.0], requires_grad=True)
    loss, stats = policy_loss(new, torch.zeros(3), torch.tensor([-1.0, 1.0, 1.0]), 0.2)
    penalties = [kl_loss(new, torch.zeros(3), kind) for kind in ("k2", "k3")]
    sum(x.sum() for x in (loss, *penalties)).backward()
    assert all(torch.isfinite(x).all() for x in (loss, new.grad, *stats.values(), *penalties))


@pytest.mark.parametrize(
    "kind, formula, slope",
    [
        ("k2", lambda x: 0.5 * x * x, lambda x: -x),
        ("k3", lambda x: math.exp(x) - 1 - x, lambda x: 1 - math.exp(x)),
    ],
)
def test_line_17_k2_and_k3_are_schulman_s_estimates(kind, formula, slope):
    """x = log π_ref − log π.

    Never negative, 0 at the reference, and the gradient for log π pulls towards it.
    """
    new, ref = noise(40).requires_grad_(), noise(40, seed=1)
    loss = kl_loss(new, ref, kind)
    loss.sum().backward()
    xs = (ref - new).tolist()
    assert (
        loss.tolist() == pytest.approx([formula(x) for x in xs], rel=1e-4, abs=1e-6)
        and min(loss.tolist()) >= 0
    )
    assert new.grad.tolist() == pytest.approx([slope(x) for x in xs], rel=1e-4, abs=1e-6)
    assert all((g > 0) == (n > r) for g, n, r in zip(new.grad.tolist(), new.tolist(), ref.tolist()))
    assert kl_loss(ref, ref, kind).tolist() == [0.0] * 40


def test_line_17_k3_is_the_kl_on_average_and_k2_s_gradient_is_the_kl_s():
    """Over all tokens of one distribution, weighted by their probability."""
    logits, ref = noise(30).double().requires_grad_(), noise(30, seed=1).double().log_softmax(-1)
    logp = logits.log_softmax(-1)
    p = logp.exp().detach()
    kl = (logp.exp() * (logp - ref)).sum()
    assert (p * kl_loss(logp, ref, "k3")).sum().item() == pytest.approx(kl.item(), rel=1e-9)
    (want,) = torch.autograd.grad(kl, logits, retain_graph=True)
    (got,) = torch.autograd.grad((p * kl_loss(logp, ref, "k2")).sum(), logits)
    assert got.tolist() == pytest.approx(want.tolist(), rel=1e-6, abs=1e-9)


def test_line_19_the_value_loss_takes_the_worse_of_clipped_and_not():
    values, old, returns = noise(40), noise(40, seed=1), noise(40, seed=2)
    loss, stats = value_loss(values, old, returns, 0.2)
    clipped = 0
    for i, (v, o, r) in enumerate(zip(values.tolist(), old.tolist(), returns.tolist())):
        bounded = (o + min(max(v - o, -0.2), 0.2) - r) ** 2
        clipped += bounded > (v - r) ** 2
        assert float(loss[i]) == pytest.approx(0.5 * max((v - r) ** 2, bounded), rel=1e-5, abs=1e-7)
        assert float(stats["value_clipfrac"][i]) == (bounded > (v - r) ** 2)
    assert 0 < clipped < 40


def test_line_13_every_token_has_its_own_loss_whatever_stands_beside_it():
    new, old, advantages = noise(40), noise(40, seed=1), noise(40, seed=2)
    for loss in (policy_loss, value_loss):
        whole, stats = loss(new, old, advantages, 0.2)
        for part in (slice(0, 3), slice(3, 30), slice(30, 40)):
            got, logged = loss(new[part], old[part], advantages[part], 0.2)
            assert torch.equal(got, whole[part]) and all(
                torch.equal(logged[name], stats[name][part]) for name in stats
            )


def test_line_13_token_weights_are_the_levels_formulas_however_the_responses_are_cut():
    """Σ weight · loss / tokens: the mean over tokens; over responses of means.

    Over responses of sums over a constant.
    """
    lengths, most = [5, 1, 3, 4], 10
    losses = [noise(n, seed=n).tolist() for n in lengths]
    tokens, n = sum(lengths), len(lengths)
    want = {
        "token": sum(x for row in losses for x in row) / tokens,
        "sequence": sum(sum(row) / len(row) for row in losses) / n,
        "constant": sum(sum(row) / most for row in losses) / n,
    }
    for level, value in want.items():
        for cut in ([[0, 1, 2, 3]], [[2], [0, 3], [1]], [[3, 2, 1], [0]]):
            total = 0.0
            for rows in cut:
                weights = token_weights(level, [lengths[i] for i in rows], tokens, n, most)
                total += sum(w * x for w, i in zip(weights, rows) for x in losses[i]) / tokens
            assert total == pytest.approx(value, rel=1e-6), (level, cut)


# --- the KL controller ----------------------------------------------------------------------------


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
