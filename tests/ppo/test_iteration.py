"""One whole iteration: the same at every division of the ranks, and equal to transformers' models with the formulas
written out. Numbers in names: lines of docs/ppo.md."""

import math

import pytest
import torch

from tests.ppo import worker
from tests.ppo.worker import KL_COEF, LR, MAX_GRAD_NORM, STOPS, TEMPERATURE, VALUE_LR, WEIGHTS
from tests.trainer.tiny import apart, padded, theirs

TOLERANCE = 1e-5
GAMMA, LAM, CLIP, CLIP_VALUE, VF_COEF = 1.0, 0.95, 0.2, 0.2, 0.1


class Reference:
    """The update of given rollouts by transformers' models on padded batches, torch's AdamW and clipping."""

    def __init__(self, folder, rollouts: list[dict], minibatches: list[list[int]]) -> None:
        self.rows = rollouts
        self.ids, self.mask = padded([r["prompt"] + r["response"] for r in rollouts])
        self.policy, self.value = theirs(folder / "policy"), theirs(folder / "value")
        everyone = range(len(rollouts))
        with torch.no_grad():
            self.old, self.entropy = self.logprobs(self.policy, everyone)
            self.ref, _ = self.logprobs(theirs(folder / "reference"), everyone)
            self.old_values, after = self.values(everyone)
            scores = theirs(folder / "verifier")(input_ids=self.ids, attention_mask=self.mask).logits.squeeze(-1)
        self.verifier = scores.tolist()
        self.rule = [float(sum(r["response"]) % 2 == int(p.gold)) for r, p in zip(rollouts, worker.prompts())]
        self.scores = [WEIGHTS["verifier"] * v + WEIGHTS["rule"] * r for v, r in zip(self.verifier, self.rule)]
        self.rewards, raw, self.returns = [], [], []
        for i, row in enumerate(rollouts):
            n = len(row["response"])
            reward = [-KL_COEF * float(self.old[i][t] - self.ref[i][t]) for t in range(n)]
            reward[-1] += self.scores[i]
            # Line 10, bootstrap: what did not end on a stop token is followed by its value, the rest by nothing.
            following = 0.0 if row["response"][-1] in STOPS else float(after[i])
            v = [*self.old_values[i].tolist(), following]
            delta = [reward[t] + GAMMA * v[t + 1] - v[t] for t in range(n)]
            raw.append([sum((GAMMA * LAM) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])
            self.rewards.append(reward)
            self.returns.append(torch.tensor([raw[-1][t] + v[t] for t in range(n)]))
        flat = [a for row in raw for a in row]
        mean = sum(flat) / len(flat)
        std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
        self.advantages = [torch.tensor([(a - mean) / std for a in row]) for row in raw]
        self.sums = dict.fromkeys(
            ("policy_loss", "value_loss", "approxkl", "clipfrac", "value_clipfrac", "policy_grad_norm", "value_grad_norm"), 0.0)
        adams = [torch.optim.AdamW(m.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0)
                 for m, lr in ((self.policy, LR), (self.value, VALUE_LR))]
        for minibatch in minibatches:
            self.update(minibatch, *adams)
        self.means = {name: total / len(minibatches) for name, total in self.sums.items()}

    def response(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """x[t] predicts token t + 1: the entries before each response token."""
        start = len(self.rows[i]["prompt"])
        return x[start - 1 : start + len(self.rows[i]["response"]) - 1]

    def logprobs(self, model, rows):
        rows = list(rows)
        logp = (model(input_ids=self.ids[rows], attention_mask=self.mask[rows]).logits / TEMPERATURE).log_softmax(-1)
        found = []
        for i, each in zip(rows, logp):
            each = self.response(i, each)
            found.append((each.gather(1, torch.tensor(self.rows[i]["response"]).unsqueeze(1)).squeeze(1), -(each.exp() * each).sum(-1)))
        return [logprob for logprob, _ in found], [entropy for _, entropy in found]

    def values(self, rows):
        """Before each response token; and at the last token, for what comes after it."""
        rows = list(rows)
        hidden = self.value.model(input_ids=self.ids[rows], attention_mask=self.mask[rows]).last_hidden_state
        scores = self.value.score(hidden).squeeze(-1)
        ends = [len(self.rows[i]["prompt"]) + len(self.rows[i]["response"]) - 1 for i in rows]
        return [self.response(i, s) for i, s in zip(rows, scores)], [s[end] for s, end in zip(scores, ends)]

    def update(self, rows: list[int], policy_adam, value_adam) -> None:
        tokens = sum(len(self.rows[i]["response"]) for i in rows)
        new = torch.cat(self.logprobs(self.policy, rows)[0])
        old, advantages = (torch.cat([x[i] for i in rows]) for x in (self.old, self.advantages))
        ratio = torch.exp(new - old)
        plain, clipped = advantages * ratio, advantages * ratio.clip(1 - CLIP, 1 + CLIP)
        policy_loss = -torch.minimum(plain, clipped).sum() / tokens
        v = torch.cat(self.values(rows)[0])
        v_old, returns = (torch.cat([x[i] for i in rows]) for x in (self.old_values, self.returns))
        bounded = v_old + (v - v_old).clip(-CLIP_VALUE, CLIP_VALUE)
        worse = torch.maximum((v - returns) ** 2, (bounded - returns) ** 2)
        value_loss = 0.5 * worse.sum() / tokens
        norms = []
        for loss, model, adam in ((policy_loss, self.policy, policy_adam), (VF_COEF * value_loss, self.value, value_adam)):
            adam.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
            adam.step()
        with torch.no_grad():
            for name, x in {
                "policy_loss": policy_loss, "value_loss": value_loss, "policy_grad_norm": norms[0], "value_grad_norm": norms[1],
                "approxkl": (ratio - 1 - (new - old)).sum() / tokens, "clipfrac": (clipped < plain).sum() / tokens,
                "value_clipfrac": ((bounded - returns) ** 2 > (v - returns) ** 2).sum() / tokens,
            }.items():
                self.sums[name] += float(x)


@pytest.fixture(scope="module")
def expected(folder, results):
    run = results["one rank"]["iteration"]
    return Reference(folder, run["rollouts"], run["minibatches"])


RUNS = list(worker.RUNS)


@pytest.mark.parametrize("run", RUNS)
def test_line_27_every_division_draws_the_same_tokens(results, layout, run):
    for name in ("prompt", "response", "truncated"):
        assert [r[name] for r in results[layout][run]["rollouts"]] == [r[name] for r in results["one rank"]["iteration"]["rollouts"]]


def test_the_rollouts_are_worth_comparing(results):
    rows = results["one rank"]["iteration"]["rollouts"]
    assert [r["prompt"] for r in rows] == [p.tokens for p in worker.prompts()]
    assert {r["truncated"] for r in rows} == {True, False} and {r["rule"] for r in rows} == {0.0, 1.0}
    assert len({len(r["response"]) for r in rows}) > 3
    assert any(len(set(map(tuple, pair))) == 2 for pair in zip(*[[r["response"] for r in rows[k::2]] for k in (0, 1)]))


@pytest.mark.parametrize("run", RUNS)
def test_lines_4_6_8_13_17_scores_logprobs_values_and_advantages_are_the_reference_s(results, expected, layout, run):
    rows = results[layout][run]["rollouts"]
    for i, row in enumerate(rows):
        for name, want in (("score", expected.scores[i]), ("verifier", expected.verifier[i]), ("rule", expected.rule[i])):
            assert row[name] == pytest.approx(want, rel=TOLERANCE, abs=TOLERANCE)
        for name, want in (("logprobs", expected.old), ("ref_logprobs", expected.ref), ("entropy", expected.entropy),
                           ("values", expected.old_values), ("returns", expected.returns),
                           ("advantages", expected.advantages)):
            assert row[name] == pytest.approx(want[i].tolist(), rel=TOLERANCE, abs=TOLERANCE), name
        assert row["rewards"] == pytest.approx(expected.rewards[i], rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("run", RUNS)
def test_lines_13_16_19_losses_norms_and_weights_are_the_reference_s(results, expected, layout, run):
    got = results[layout][run]
    for name, want in expected.means.items():
        assert got["stats"][name] == pytest.approx(want, rel=TOLERANCE), name
    for role in ("policy", "value"):
        model = getattr(expected, role)
        want = {k: p.detach() for k, p in model.state_dict().items()}
        assert apart(got[role], want) < TOLERANCE


def test_the_update_is_worth_comparing(expected, folder):
    """Clipping bites, norms are clipped, and every tensor moves far more than the tolerance."""
    assert 0.05 < expected.means["clipfrac"] < 0.95 and 0.05 < expected.means["value_clipfrac"] < 0.95
    assert expected.means["policy_grad_norm"] > MAX_GRAD_NORM
    for role in ("policy", "value"):
        before = theirs(folder / role).state_dict()
        assert all(float((p.detach() - before[k]).norm() / before[k].norm()) > 30 * TOLERANCE
                   for k, p in getattr(expected, role).state_dict().items())


@pytest.mark.parametrize("run", RUNS)
def test_line_26_what_is_logged(results, expected, layout, run):
    stats, rows = results[layout][run]["stats"], results[layout][run]["rollouts"]
    n, tokens = len(rows), sum(len(r["response"]) for r in rows)
    kl = [float((o - r).sum()) for o, r in zip(expected.old, expected.ref)]
    values, returns = torch.cat(expected.old_values).double(), torch.cat(expected.returns).double()
    want = {
        "reward": sum(expected.scores) / n,
        "reward/verifier": sum(expected.verifier) / n,
        "reward/rule": sum(expected.rule) / n,
        "kl": sum(kl) / n,
        "kl_max": max(float((o - r).max()) for o, r in zip(expected.old, expected.ref)),
        "entropy": sum(float(e.sum()) for e in expected.entropy) / tokens,
        "response_length": tokens / n,
        "truncated": sum(r["response"][-1] not in STOPS for r in rows) / n,
        "values": float(values.mean()),
        "returns": float(returns.mean()),
        "explained_variance": 1 - float((returns - values).var() / returns.var()),
        "kl_coef": KL_COEF,
        "skipped": 0.0,
        "optimizer_steps": 4,
    } | expected.means
    for name, value in want.items():
        assert stats[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), name
    timed = {"seconds/generate", "seconds/score", "seconds/update", "tokens_per_s/generate", "tokens_per_s/update"}
    assert all(stats[name] > 0 for name in timed)
    assert set(stats) == {*want, *timed, "logprob_drift"}


def test_line_30_decoding_with_the_cache_drifts_little_from_one_forward(results, layout):
    for run in RUNS:
        got = results[layout][run]
        drift = max(abs(a - b) for r in got["rollouts"] for a, b in zip(r["logprobs"], r["rollout_logprobs"]))
        assert got["stats"]["logprob_drift"] == pytest.approx(drift, abs=1e-9)
        assert 0 < drift < 2e-5


@pytest.mark.parametrize("run", RUNS)
def test_line_4_the_ratio_is_exactly_one_before_the_first_step(results, layout, run):
    assert all(results[layout][run]["ratio starts at one"])


def test_line_14_advantages_are_whitened_over_all_ranks_rollouts(results, layout):
    for run in RUNS:
        every = torch.tensor([a for r in results[layout][run]["rollouts"] for a in r["advantages"]])
        assert float(every.mean()) == pytest.approx(0, abs=1e-6) and float(every.std(correction=0)) == pytest.approx(1, rel=1e-5)


def test_line_21_every_epoch_takes_all_minibatches_reshuffled(results, layout):
    """Each rollout once an epoch, the same minibatches at any division, drawn as the seed says."""
    for run in RUNS:
        got = results[layout][run]
        assert got["steps"] == got["stats"]["optimizer_steps"] == 2 * 2
        plan, everyone = got["minibatches"], list(range(8))
        assert [sorted(a + b) for a, b in zip(plan[::2], plan[1::2])] == [everyone, everyone]
        assert plan[:2] != plan[2:]
        assert plan == results["one rank"]["iteration"]["minibatches"]
    assert plan[0] != everyone[:4], "not shuffled"
