"""Rollouts, truncation, settings and the outer loop, in one process.

Numbers in names: lines of docs/ppo.md.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from src.data.encoding import Prompt
from src.errors import UserError
from src.generation.engine import Completion
from src.generation.sampling import Sampling
from src.logs import RunLog
from src.models.batch import Batch, Sequence, response_logprobs, response_values
from src.ppo import trainer
from src.ppo.buffer import RolloutBuffer
from src.ppo.dump import SampleTexts, rows_of
from src.ppo.fit import DEFAULT_KL_COEF, changed_rewards, fit, read_state
from src.ppo.loss import value_loss
from src.ppo.statistics import rollout_statistics
from src.settings.declaration import build, declared, flat
from src.settings.ppo import PolicyOptimizerSettings, PPOSettings, PPOTrainSettings
from tests.ppo.worker import TEMPERATURE, Recorder, make_ppo, prompts, spelled
from tests.trainer.tiny import EOS, ours, some_sequences


def iterate(ppo, batch=None, number=0):
    recorder = Recorder(ppo)
    return ppo.iteration(number, batch or prompts(), 1e-3, 1e-3), recorder


class Scripted:
    """An engine that returns given completions."""

    def __init__(self, completions, parallel):
        self.completions, self.parallel = completions, parallel

    def generate(self, prompts, sampling, stop_ids, samples=None, on_tokens=None):
        return self.completions


def buffer_of(responses, truncated=None, prompt=(1, 5, 6), gold="", rows=None):
    prompts = [Prompt(list(prompt), gold, row) for row in rows or [{}] * len(responses)]
    return RolloutBuffer(
        prompts,
        list(range(len(responses))),
        torch.tensor([t for r in responses for t in (*prompt, *r)]),
        [len(prompt) + len(r) for r in responses],
        torch.tensor(truncated or [False] * len(responses)),
        torch.zeros(sum(map(len, responses))),
    )


# --- log-probabilities ----------------------------------------------------------------------------


def test_lines_1_2_one_temperature_and_the_whole_softmax_for_old_and_reference(folder, parallel):
    """Even where sampling keeps only some tokens: without --replay_mask nothing is renormalised."""
    ppo = make_ppo(
        folder, parallel, sampling=Sampling(max_new_tokens=6, temperature=0.5, top_k=3, seed=1)
    )
    _, recorder = iterate(ppo)
    buffer, fresh = recorder.buffer, ours(folder / "policy", parallel)
    batch, index = buffer.select(list(range(len(buffer))))
    with torch.no_grad():
        for model, got in (
            (fresh, buffer.logprobs),
            (ours(folder / "reference", parallel), buffer.ref_logprobs),
        ):
            logits = model.logits(model(batch.tokens, batch.layout)[batch.rows]).double() / 0.5
            want = logits.log_softmax(-1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)
            assert torch.allclose(got[index].double(), want, atol=1e-5)


def test_line_3_everything_after_the_logits_is_fp32_in_a_bf16_run(folder, parallel):
    ppo = make_ppo(folder, parallel, torch.bfloat16)
    kept = {}
    real = ppo._score

    def spy(number, buffer):
        real(number, buffer)
        batch, index = buffer.select(list(range(len(buffer))))
        with torch.no_grad():
            model = ppo.policy.model
            logits = model.logits(model(batch.tokens, batch.layout)[batch.rows])
        assert logits.dtype == torch.bfloat16
        wide = (
            (logits.double() / TEMPERATURE)
            .log_softmax(-1)
            .gather(1, batch.targets.unsqueeze(1))
            .squeeze(1)
        )
        kept["error"] = float((buffer.logprobs[index].double() - wide).abs().max())

    ppo._score = spy
    stats, recorder = iterate(ppo, number=1)
    for name in (
        "logprobs",
        "ref_logprobs",
        "entropy",
        "values",
        "rewards",
        "advantages",
        "returns",
        "scores",
    ):
        assert getattr(recorder.buffer, name).dtype == torch.float32, name
    # bf16 log-probabilities would be off by up to 2^-7 nats; what remains is the batch's effect on
    # the bf16 trunk
    assert kept["error"] < 0.06 and stats["policy_skipped"] == stats["value_skipped"] == 0
    assert recorder.ratio_starts_at_one()


def test_line_5_nothing_is_random_in_a_forward(folder, parallel):
    model, batch = ours(folder / "policy", parallel), Batch.of(some_sequences(4), parallel.device)
    assert torch.equal(response_logprobs(model, batch)[0], response_logprobs(model, batch)[0])


def test_line_6_a_response_s_numbers_do_not_depend_on_its_neighbours(folder, parallel):
    policy, value = ours(folder / "policy", parallel), ours(folder / "value", parallel)
    rows = some_sequences(7, seed=2)
    together = Batch.of(rows, parallel.device)
    with torch.no_grad():
        logprobs, values = response_logprobs(policy, together)[0], response_values(value, together)
        for i, row in enumerate(rows):
            alone = Batch.of([row], parallel.device)
            part = slice(sum(together.responses[:i]), sum(together.responses[: i + 1]))
            assert torch.allclose(response_logprobs(policy, alone)[0], logprobs[part], atol=1e-5)
            assert torch.allclose(response_values(value, alone)[0], values[0][part], atol=1e-5)
            assert torch.allclose(response_values(value, alone)[1], values[1][i : i + 1], atol=1e-5)


def test_lines_7_8_eos_and_the_first_token_are_actions_and_nothing_else_is(folder, parallel):
    """Row t predicts token t + 1.

    From the last prompt token, which predicts the first response token, to EOS.
    """
    buffer = buffer_of([[7, 8, EOS], [EOS]], [False, False])
    batch, index = buffer.select([1, 0])
    assert batch.rows.tolist() == [2, 4 + 2, 4 + 3, 4 + 4]
    assert batch.targets.tolist() == [EOS, 7, 8, EOS]
    assert index.tolist() == [3, 0, 1, 2]
    assert batch.ends.tolist() == [3, 9]


# --- truncation -----------------------------------------------------------------------------------


def test_line_9_truncation_is_read_from_the_stop_reason(folder, parallel):
    """Ended by EOS at exactly max_new_tokens is not truncated; shorter, cut by the context, is."""
    ppo = make_ppo(folder, parallel, sampling=Sampling(max_new_tokens=3, seed=0))
    ppo.rollouts.engine = Scripted(
        [Completion([7, 8, EOS], [-1.0] * 3, "stop"), Completion([7, 8], [-1.0] * 2, "length")],
        parallel,
    )
    ppo.rollouts.rewards = ppo.rollouts.rewards[1:]
    buffer = ppo.rollouts.make(0, [Prompt([1, 5], "0"), Prompt([1, 6], "0")], None, None)
    assert buffer.truncated.tolist() == [False, True]


def test_line_9_the_engine_calls_a_stop_at_the_very_last_token_a_stop(folder, parallel):
    ppo = make_ppo(folder, parallel, sampling=Sampling(max_new_tokens=1, seed=0))
    ppo.rollouts.stop_ids = set(range(0, 64, 2))
    buffer = ppo.rollouts.make(0, [Prompt([1, 5], "0")] * 40, None, None)
    last = buffer.tokens.view(40, 3)[:, 2]
    assert buffer.response_lengths == [1] * 40 and {int(t) % 2 for t in last} == {0, 1}
    assert buffer.truncated.tolist() == [bool(t % 2) for t in last.tolist()]


def advantages_of(folder, parallel, policy, last_values):
    penalty = {"truncation_penalty": 0.7} if policy == "penalty" else {}
    ppo = make_ppo(folder, parallel, truncated=policy, gamma=0.9, lam=0.8, **penalty)
    buffer = buffer_of([[7, 8, EOS], [9, 7, 8, 9], [9]], [False, True, True])
    generator = torch.Generator().manual_seed(0)
    for name in ("logprobs", "ref_logprobs", "values"):
        setattr(buffer, name, torch.randn(8, generator=generator))
    buffer.scores, buffer.last_values = torch.tensor([1.0, 0.5, 0.0]), torch.tensor(last_values)
    buffer.lengths_of_all = buffer.response_lengths
    ppo._advantages(buffer)
    return buffer


@pytest.mark.parametrize("policy", ["bootstrap", "zero", "penalty"])
def test_line_10_what_follows_a_truncated_response(folder, parallel, policy):
    last_values = [5.0, 3.0, -2.0]
    buffer = advantages_of(folder, parallel, policy, last_values)
    raw, at = [], 0
    for i, (n, cut) in enumerate([(3, False), (4, True), (1, True)]):
        part = slice(at, at + n)
        kl, values = (
            (buffer.logprobs - buffer.ref_logprobs)[part].tolist(),
            buffer.values[part].tolist(),
        )
        rewards = [-0.3 * k for k in kl]
        rewards[-1] += float(buffer.scores[i]) - (0.7 if cut and policy == "penalty" else 0.0)
        values.append(last_values[i] if cut and policy == "bootstrap" else 0.0)
        delta = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(n)]
        advantages = [sum(0.72 ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        assert buffer.rewards[part].tolist() == pytest.approx(rewards, rel=1e-5, abs=1e-6)
        returns = [a + v for a, v in zip(advantages, values)]
        assert buffer.returns[part].tolist() == pytest.approx(returns, rel=1e-5, abs=1e-6)
        raw, at = raw + advantages, at + n
    mean = sum(raw) / 8
    std = (sum((a - mean) ** 2 for a in raw) / 8) ** 0.5
    assert buffer.advantages.tolist() == pytest.approx(
        [(a - mean) / std for a in raw], rel=1e-4, abs=1e-5
    )


def test_line_11_the_value_after_eos_is_zero(folder, parallel):
    """Whatever the value model says there, NaN included; after a truncated response it counts."""
    a = advantages_of(folder, parallel, "bootstrap", [5.0, 3.0, -2.0])
    b = advantages_of(folder, parallel, "bootstrap", [torch.nan, 3.0, -2.0])
    c = advantages_of(folder, parallel, "bootstrap", [5.0, 4.0, -2.0])
    assert torch.equal(a.advantages, b.advantages) and torch.equal(a.returns, b.returns)
    assert not torch.equal(a.advantages, c.advantages)


def test_line_11_the_value_at_the_last_token_is_not_fitted(folder, parallel, monkeypatch):
    """One value per response token enters the loss, and no gradient the last token's row."""
    fitted = []
    monkeypatch.setattr(
        trainer, "value_loss", lambda v, *rest: fitted.append(v.numel()) or value_loss(v, *rest)
    )
    ppo = make_ppo(folder, parallel, mini_batches=1, ppo_epochs=1)
    _, recorder = iterate(ppo)
    assert sum(fitted) == sum(recorder.buffer.response_lengths)
    model, batch = (
        ours(folder / "value", parallel),
        Batch.of([Sequence([1, 5, 7, 8, EOS], 2)], parallel.device),
    )
    asked, hidden, forward = [], [], model.forward

    def keep(tokens, layout, rows):
        asked.append(rows)
        hidden.append(forward(tokens, layout, rows))
        hidden[0].retain_grad()
        return hidden[0]

    model.forward = keep
    response_values(model, batch)[0].sum().backward()
    assert asked[0][hidden[0].grad.abs().sum(-1) > 0].tolist() == [1, 2, 3]


# --- the batch as a whole -------------------------------------------------------------------------


def test_line_15_a_single_rollout_is_safe(folder, parallel):
    ppo = make_ppo(folder, parallel, max_buffer_size=1, mini_batches=1)
    ppo.rollouts.engine = Scripted([Completion([EOS], [-1.0], "stop")], parallel)
    stats, recorder = iterate(ppo, [Prompt([1, 5, 6], "1")])
    assert (
        recorder.buffer.advantages.tolist() == [0.0]
        and stats["policy_skipped"] == stats["value_skipped"] == 0
    )
    assert all(
        torch.isfinite(p).all() for role in (ppo.policy, ppo.value) for p in role.model.parameters()
    )
    assert stats["explained_variance"] == 0.0


def test_line_18_the_logged_kl_is_not_clipped(parallel):
    buffer = buffer_of([[7, 8], [9]], [False, False])
    buffer.scores = buffer.shaped = buffer.last_values = torch.zeros(2)
    buffer.lengths_of_all = [2, 1]
    buffer.logprobs, buffer.ref_logprobs = (
        torch.tensor([0.0, 1.0, 2.0]),
        torch.tensor([-50.0, 2.0, -1.0]),
    )
    for name in ("entropy", "values", "returns"):
        setattr(buffer, name, torch.zeros(3))
    stats = rollout_statistics(buffer, parallel, is_comparable=True)
    assert stats["kl"] == pytest.approx((50 - 1 + 3) / 2) and stats["kl_max"] == 50


def test_line_20_the_controller_gets_the_batch_s_mean_kl_once(folder, parallel):
    ppo = make_ppo(folder, parallel)
    calls = []
    ppo.state.kl = SimpleNamespace(kl_coef=0.3, update=lambda *given: calls.append(given))
    stats, recorder = iterate(ppo)
    b = recorder.buffer
    assert calls == [(stats["kl"], 8)]
    assert stats["kl"] == pytest.approx(float((b.logprobs - b.ref_logprobs).sum()) / 8, rel=1e-6)


@pytest.mark.parametrize("epochs, minibatches", [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_line_21_optimizer_steps_are_epochs_times_minibatches(
    folder, parallel, epochs, minibatches
):
    ppo = make_ppo(folder, parallel, ppo_epochs=epochs, mini_batches=minibatches)
    stats, recorder = iterate(ppo)
    assert (
        len(recorder.steps) == stats["policy_steps"] == stats["value_steps"] == epochs * minibatches
    )
    plan = recorder.minibatches
    for epoch in range(epochs):
        part = plan[epoch * minibatches : (epoch + 1) * minibatches]
        assert sorted(i for rows in part for i in rows) == list(range(8))
        assert max(map(len, part)) - min(map(len, part)) <= 1


def test_line_21_epochs_and_iterations_are_shuffled_anew(folder, parallel):
    ppo = make_ppo(folder, parallel)
    buffer = buffer_of([[7]] * 8, [False] * 8)
    buffer.lengths_of_all = [1] * 8
    plans = [ppo._plan(number, epoch, buffer) for number, epoch in ((0, 0), (0, 1), (1, 0))]
    plans = [
        [sorted(i for rows in minibatch.rows for i in rows) for minibatch in plan] for plan in plans
    ]
    assert len({str(plan) for plan in plans}) == 3
    assert ppo._plan(0, 0, buffer) == ppo._plan(0, 0, buffer)


def test_line_27_samples_differ_and_a_seed_reproduces_them(folder, parallel):
    def responses(seed, number=0):
        ppo = make_ppo(
            folder, parallel, sampling=Sampling(max_new_tokens=8, temperature=1.0, seed=seed)
        )
        ppo.rollouts.stop_ids = {63}
        buffer = ppo.rollouts.make(number, [Prompt([1, 5, 6], "0")] * 6, None, None)
        return [tuple(t.tolist()) for t in buffer.tokens.split(buffer.lengths)]

    first = responses(0)
    assert len(set(first)) == 6 and responses(0) == first
    assert not set(first) & set(responses(1)), "another seed draws the same"
    assert not set(first) & set(responses(0, number=1)), "the next iteration draws the same"


def test_line_27_iterations_number_their_samples_apart(folder, parallel):
    ppo, seen = make_ppo(folder, parallel), []
    generate = ppo.rollouts.engine.generate
    ppo.rollouts.engine.generate = lambda p, s, stop, samples, f: (
        seen.append(samples) or generate(p, s, stop, samples, f)
    )
    for number in (0, 1):
        ppo.iteration(number, prompts(), 1e-3, 1e-3)
    assert len(set(seen[0] + seen[1])) == 16


def test_line_27_rounds_that_fill_up_a_batch_number_their_samples_apart(folder, parallel):
    ppo, seen = make_ppo(folder, parallel, samples_per_prompt=2, filter_rounds=3), []
    ppo.rollouts.rewards = ppo.rollouts.rewards[1:]
    generate = ppo.rollouts.engine.generate
    ppo.rollouts.engine.generate = lambda p, s, stop, samples, f: (
        seen.extend(samples) or generate(p, s, stop, samples, f)
    )
    for number in (0, 1):
        ppo.iteration(
            number, [Prompt(p.tokens, "7") for p in prompts()], 1e-3, 1e-3
        )  # never the answer: all are left out
    assert len(seen) == len(set(seen)) == 2 * 3 * 8


def test_line_28_a_reward_of_zero_is_a_reward(folder, parallel):
    ppo = make_ppo(folder, parallel)
    ppo.rollouts.rewards = ppo.rollouts.rewards[1:]
    stats, recorder = iterate(ppo, [Prompt(p.tokens, "7") for p in prompts()])  # never the answer
    assert (
        stats["reward"] == stats["reward/rule"] == 0.0
        and recorder.buffer.scores.tolist() == [0.0] * 8
    )
    b = recorder.buffer
    assert torch.allclose(b.rewards, -0.3 * (b.logprobs - b.ref_logprobs), atol=1e-7)


# --- the outer loop -------------------------------------------------------------------------------


def schedule(seed=3, eval_every=None, **change):
    """What `fit` is told of rates and times."""
    plan = dict(lr=1e-3, critic_lr=2e-3, warmup=0.0, schedule="linear", epochs=2, iterations=None)
    return build(PolicyOptimizerSettings, plan | change), seed, eval_every


class Fake:
    """Stands for a PPO and writes down what it is asked for."""

    def __init__(self, stats=None):
        rollouts = SimpleNamespace(max_buffer_size=4, samples_per_prompt=2)
        self.settings, self.calls, self.stats = SimpleNamespace(rollouts=rollouts), [], stats or {}
        self.stage = SimpleNamespace(roles={})

    def iteration(self, number, batch, lr, critic_lr, more):
        self.calls.append((number, [p.tokens[0] for p in batch], lr, critic_lr))
        self.more = [p.tokens[0] for p in more()] if self.stats.get("more") else None
        known = dict.fromkeys(
            ("reward", "kl", "entropy", "response_length", "truncated", "clipfrac"), 0.0
        )
        return known | self.stats


def outer(plan, ppo=None):
    ppo, evaluated = ppo or Fake(), []
    with RunLog(None, "test", {}, rank=1) as log:
        fit(
            ppo,
            [Prompt([i]) for i in range(5)],
            *plan,
            log,
            lambda name, number: evaluated.append((name, number)),
        )
    return ppo.calls, evaluated


def test_every_pass_takes_every_prompt_with_all_its_samples_in_full_batches():
    calls, evaluated = outer(schedule())
    assert [number for number, *_ in calls] == list(range(6)) and evaluated == [
        (f"epoch {i}", i) for i in (0, 1, 2)
    ]
    assert all(len(batch) == 4 and batch[::2] == batch[1::2] for _, batch, *_ in calls)
    drawn = [i for _, batch, *_ in calls for i in batch[::2]]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5))
    assert drawn[:5] != drawn[5:10], "not reshuffled"
    for number, _, lr, critic_lr in calls:
        assert lr == pytest.approx(1e-3 * (1 - number / 6)) and critic_lr == pytest.approx(2 * lr)


@pytest.mark.parametrize(
    "change, evaluated",
    [
        ({"iterations": 1}, [("epoch", 0), ("epoch", 1)]),
        ({"iterations": 4}, [("epoch", 0), ("epoch", 1), ("epoch", 2)]),
        ({"iterations": 8}, [("epoch", 0), ("epoch", 1), ("epoch", 2), ("epoch", 3)]),
        (
            {"iterations": 5, "eval_every": 2},
            [("iteration", 0), ("iteration", 2), ("iteration", 4), ("iteration", 5)],
        ),
    ],
)
def test_iterations_end_the_run_early_or_go_on_and_evaluations_come_as_planned(change, evaluated):
    calls, seen = outer(schedule(**change))
    assert len(calls) == change["iterations"] and seen == [
        (f"{unit} {at}", at) for unit, at in evaluated
    ]


def test_the_seed_draws_the_prompts_and_what_fills_up_a_batch_comes_next():
    def batches(seed, **stats):
        return [batch for _, batch, *_ in outer(schedule(seed=seed), Fake(stats))[0]]

    assert batches(1) == batches(1) != batches(2)
    assert batches(1, more=1.0) == batches(1)[::2] + batches(1, more=1.0)[3:], (
        "every second batch fills up the one before"
    )


def test_line_16_skipped_steps_and_iterations_without_a_lesson_are_said():
    class Log(RunLog):
        said: list = []

        def warning(self, message):
            self.said.append(message)

    with Log(None, "test", {}, rank=1) as log:
        for stats in ({"policy_skipped": 0.5}, {"value_skipped": 1.0}, {}):
            fit(Fake(stats), [Prompt([0])], *schedule(iterations=1), log, lambda *_: None)
        lost = Fake()
        lost.iteration = lambda *_, **__: {"reward": 0.0}
        fit(lost, [Prompt([0])], *schedule(iterations=1), log, lambda *_: None)
    assert [("not finite" in x, "nothing was learned" in x) for x in Log.said] == [
        (True, False)
    ] * 2 + [(False, True)]


@pytest.mark.parametrize(
    "change", [{"lr": 0.0}, {"critic_lr": -1.0}, {"warmup": 1.0}, {"epochs": 0}, {"iterations": 0}]
)
def test_schedules_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=f"--{next(iter(change))} "):
        schedule(**change)


# --- settings -------------------------------------------------------------------------------------


def test_line_24_defaults_are_the_recipe_s():
    flags = {name: setting.default for name, setting in declared(PPOTrainSettings).items()}
    recipe = dict(
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        ppo_epochs=4,
        truncated="bootstrap",
    )
    values = flat(build(PPOSettings, {}))
    for name, value in recipe.items():
        assert flags[name] == values[name] == value
    assert values.keys() <= flags.keys() and all(flags[n] == value for n, value in values.items())


def settings_of(**change):
    return build(PPOSettings, dict(max_batch_size=4, max_buffer_size=8) | change)


@pytest.mark.parametrize(
    "advantage, has_value, grouped, whitens, level, kl",
    [
        ("gae", True, False, True, "token", "k1"),
        ("grpo", False, True, False, "sequence", "k3"),
        ("dr_grpo", False, True, False, "constant", "k3"),
        ("rloo", False, True, False, "token", "k1"),
        ("reinforce++", False, False, True, "token", "k1"),
    ],
)
def test_what_the_advantage_settles_and_what_is_said_wins(
    advantage, has_value, grouped, whitens, level, kl
):
    s = settings_of(advantage=advantage, samples_per_prompt=2)
    a = s.advantages
    assert (a.has_value, a.is_grouped, a.whitens, s.level, s.kl_kind) == (
        has_value,
        grouped,
        whitens,
        level,
        kl,
    )
    s = settings_of(
        advantage=advantage,
        samples_per_prompt=2,
        whiten=not whitens,
        loss_level="constant",
        kl="k2",
    )
    assert (s.advantages.whitens, s.level, s.kl_kind) == (not whitens, "constant", "k2")


@pytest.mark.parametrize(
    "change",
    [
        *(
            {name: 0}
            for name in (
                "max_batch_size",
                "max_buffer_size",
                "mini_batches",
                "ppo_epochs",
                "samples_per_prompt",
            )
        ),
        {"mini_batches": 9},
        {"max_buffer_size": 7, "samples_per_prompt": 2},
        *({name: bad} for name in ("gamma", "lam", "lam_critic") for bad in (1.1, -0.1)),
        *(
            {name: 0.0}
            for name in (
                "cliprange",
                "cliprange_high",
                "cliprange_value",
                "target_kl",
                "reward_clip",
            )
        ),
        {"dual_clip": 1.0},
        {"ref_ema": 1.0},
        {"ref_ema": -0.1},
        {"filter_rounds": 1},
        *({"samples_per_prompt": 1, "advantage": kind} for kind in ("grpo", "dr_grpo", "rloo")),
    ],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=f"--{next(iter(change))} "):
        settings_of(**change)


VALUE_KNOBS = {
    "lam": 0.9,
    "lam_critic": 0.9,
    "cliprange_value": 0.3,
    "vf_coef": 0.5,
    "critic_warmup": 1,
    "update": "in_turn",
    "value_norm": True,
}


@pytest.mark.parametrize(
    "flag, value, others",
    [
        *(
            (flag, value, {"advantage": kind, "samples_per_prompt": 2})
            for flag, value in VALUE_KNOBS.items()
            for kind in ("grpo", "reinforce++")
        ),
        *(
            ("gamma", 0.9, {"advantage": kind, "samples_per_prompt": 2})
            for kind in ("grpo", "dr_grpo", "rloo")
        ),
        ("truncation_penalty", 2.0, {}),
        ("truncation_penalty", 2.0, {"truncated": "zero"}),
    ],
)
def test_settings_that_would_do_nothing_are_refused(flag, value, others):
    with pytest.raises(UserError, match=f"--{flag} {value}: has no effect"):
        settings_of(**{flag: value}, **others)


def test_all_refusals_come_at_once_and_what_has_an_effect_is_taken():
    with pytest.raises(UserError) as refusal:
        settings_of(gamma=2.0, cliprange=-1.0, advantage="reinforce++", lam=0.5)
    assert all(f"--{name} " in str(refusal.value) for name in ("gamma", "cliprange", "lam"))
    settings_of(**VALUE_KNOBS, gamma=0.9, truncated="penalty", truncation_penalty=2.0)
    settings_of(advantage="reinforce++", gamma=0.9)


def check_together(**change):
    given = dict(actor_ckpt_dir="A", actor_save_dir="O", train_file="T")
    needed = dict(critic_ckpt_dir="C", critic_save_dir="S", reward_model_ckpt_dir="R")
    build(PPOTrainSettings, given | needed | change)


OF_SEPARATE_ROLES = {
    "critic_train": "tp1",
    "critic_inf": "tp1",
    "ref_inf": "tp1",
    "rew_inf": "tp1",
    "ref_ema": 0.9,
    "reward_tokenizer_file": "T",
}


@pytest.mark.parametrize(
    "said, change",
    [
        ("--reward verifier,luck: choose", {"reward": ["verifier", "luck"]}),
        ("--reward rule,rule: choose", {"reward": ["rule"] * 2}),
        ("--reward_weights: 2 weights for 1", {"reward_weights": [1.0, 2.0]}),
        ("needs --reward_model_ckpt_dir", {"reward_model_ckpt_dir": None}),
        *(
            (f"needs --{flag}", {"reward": ["verifier", name]})
            for name, flag in {
                "file": "reward_file",
                "format": "format_pattern",
                "overlong": "overlong_margin",
            }.items()
        ),
        ("--reward_model_ckpt_dir: has no effect without verifier", {"reward": ["rule"]}),
        *(
            (f"--{flag}: has no effect", {flag: value})
            for flag, value in {
                "reward_file": "a.py:f",
                "format_pattern": "x",
                "overlong_margin": 3,
            }.items()
        ),
        *(
            (
                f"--overlong_margin {n}: must {be}",
                {"reward": ["overlong", "verifier"], "overlong_margin": n},
            )
            for n, be in ((0, "be at least 1"), (257, "lie in [1, --max_new_tokens 256]"))
        ),
        (
            "--format_pattern (: is no regular expression",
            {"reward": ["format", "verifier"], "format_pattern": "("},
        ),
        ("gae needs --critic_ckpt_dir", {"critic_ckpt_dir": None}),
        ("gae needs --critic_save_dir", {"critic_save_dir": None}),
        ("--critic_ckpt_dir: has no effect with --advantage rloo", {"advantage": "rloo"}),
        *(
            (f"--{flag}: has no effect with --advantage rloo", {"advantage": "rloo", flag: "tp1"})
            for flag in ("critic_train", "critic_inf")
        ),
        *(
            (
                f"--{flag} {value}: --actor_train 'tp2' says how the policy is divided",
                {"actor_train": "tp2", flag: value},
            )
            for flag, value in (
                ("model_parallel_size", 2),
                ("pipeline_parallel_size", 2),
                ("zero", 3),
                ("sequence_parallel", True),
            )
        ),
        ("--temperature 0", {"temperature": 0.0}),
        ("--ptx_coef 0.5", {"ptx_coef": 0.5}),
        ("--ptx_file P", {"ptx_file": "P"}),
        ("--ptx_batch_size: has no effect", {"ptx_batch_size": 2}),
        ("--replay_mask: nothing is left out", {"replay_mask": True}),
        *(
            (f"leave --{flag} out", {"replay_mask": True, "top_k": 2, flag: "tp1"})
            for flag in ("actor_gen", "ref_inf")
        ),
        ("give --lora_rank", {"shared_trunk": True}),
        *(
            (
                f"--{flag}: does not go with --shared_trunk",
                {"shared_trunk": True, "lora_rank": 4, flag: value},
            )
            for flag, value in OF_SEPARATE_ROLES.items()
        ),
        ("cannot be quantised", {"ref_ema": 0.9, "quantize": "nf4"}),
        *(
            (
                f"--{flag}: has no effect without",
                {"reward": ["rule"], "reward_model_ckpt_dir": None, flag: value},
            )
            for flag, value in (
                ("rew_inf", "tp1"),
                ("reward_tokenizer_file", "T"),
            )
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(said, change):
    with pytest.raises(UserError) as refusal:
        check_together(**change)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"replay_mask": True, "top_k": 4},
        {"replay_mask": True, "min_new_tokens": 2},
        {"ptx_coef": 0.1, "ptx_file": "P"},
        {"shared_trunk": True, "lora_rank": 4},
        {"reward": ["verifier", "length"], "reward_weights": [1.0, -0.1]},
        {
            "advantage": "grpo",
            "critic_ckpt_dir": None,
            "critic_save_dir": None,
            "samples_per_prompt": 4,
        },
    ],
)
def test_flags_that_go_together_are_taken(change):
    check_together(**change)


# --- what a later run goes on from ----------------------------------------------------------------


def test_lines_20_22_23_29_the_state_of_a_run_is_kept_beside_the_models_and_taken_up(
    folder, parallel, tmp_path
):
    change = dict(reward_norm=True, reward_scale=2.0, value_norm=True, ppo_epochs=1)
    ppo = make_ppo(folder, parallel, **change)
    ppo.state.kl.target = 0.1
    iterate(ppo)
    for role, state in ppo.state.beside_weights().items():
        (tmp_path / role).mkdir()
        (tmp_path / role / "ppo_state.json").write_text(json.dumps(state))
    read = {role: read_state(str(tmp_path / role)) for role in ("policy", "value")}
    assert read == ppo.state.beside_weights()
    assert read["policy"]["kl_coef"] == ppo.state.kl.kl_coef != 0.3
    later = make_ppo(folder, parallel, **change)
    later.state.take_up(read["policy"], read["value"])
    for name in ("reward_moments", "value_moments"):
        assert getattr(later.state, name).sums == getattr(ppo.state, name).sums != [0.0] * 3
    again = make_ppo(folder, parallel, **change)
    again.state.take_up({}, {})
    assert again.state.reward_moments.sums == [0.0] * 3


def test_a_folder_without_a_state_and_a_role_with_none(tmp_path):
    assert read_state(str(tmp_path)) == {}
    (tmp_path / "ppo_state.json").write_text(json.dumps({"kl_coef": 0.1234567890123}))
    assert read_state(str(tmp_path)) == {"kl_coef": 0.1234567890123}
    assert read_state(str(tmp_path)).get("kl_coef", DEFAULT_KL_COEF) == 0.1234567890123


NO_MOMENTS = (
    3.0,
    [1.0, 2.0],
    [1.0, "x", 2.0],
    [-1.0, 0.0, 0.0],
    [1.0, 0.0, -2.0],
    [1.0, math.nan, 2.0],
    [True, 1.0, 1.0],
)


@pytest.mark.parametrize(
    "name, bad",
    [
        *(("kl_coef", x) for x in ("much", -1, 1e7, None)),
        *((name, x) for name in ("reward_moments", "value_moments") for x in NO_MOMENTS),
    ],
)
def test_a_damaged_state_is_refused(tmp_path, name, bad):
    (tmp_path / "ppo_state.json").write_text(json.dumps({name: bad}))
    with pytest.raises(UserError, match=name):
        read_state(str(tmp_path))


def test_line_22_other_reward_settings_than_the_last_run_s_are_said(folder, parallel):
    before = settings_of(reward_norm=True, reward_scale=2.0).rewards
    ppo = make_ppo(folder, parallel, reward_norm=True, reward_scale=2.0)
    state = ppo.state.beside_weights()["policy"]
    assert changed_rewards(state, before) is None
    assert changed_rewards({}, before) is None, "there was no run before"
    said = changed_rewards(state, settings_of(reward_scale=2.0, reward_clip=5.0).rewards)
    assert (
        "--reward_norm True" in said
        and "--reward_clip" in said
        and "5.0" in said
        and "scale" not in said
    )
    assert "--reward_bias" in changed_rewards(
        {"kl_coef": 0.1}, settings_of(reward_bias=1.0).rewards
    )


# --- what is shown --------------------------------------------------------------------------------


def known_buffer():
    rows = [{"instruction": "one?"}, {}]
    buffer = buffer_of([[7, 8, EOS], [9]], [False, True], rows=rows, gold="g")
    buffer.components = {"verifier": torch.tensor([0.5, 1.0]), "rule": torch.tensor([1.0, 0.0])}
    buffer.scores = torch.tensor([2.25, 0.5])
    return buffer


def decoding():
    return SimpleNamespace(decode=spelled, spelled=spelled)


def test_a_rollout_s_row_before_anything_but_its_reward_is_known():
    rows = rows_of(known_buffer(), decoding())
    assert [row["prompt"] for row in rows] == ["one?", "1 5 6"] and rows[1][
        "stop_reason"
    ] == "length"
    assert rows[0] == {
        "place": 0,
        "prompt": "one?",
        "response": f"7 8 {EOS}",
        "gold": "g",
        "prompt_tokens": [1, 5, 6],
        "tokens": [7, 8, EOS],
        "stop_reason": "stop",
        "score": 2.25,
        "shaped_score": 2.25,
        "score_verifier": 0.5,
        "score_rule": 1.0,
        "rollout_logprobs": [0.0] * 3,
    }


@pytest.mark.parametrize("count", [0, 1, 5])
def test_samples_are_logged_as_text_with_their_rewards(parallel, count):
    said = []
    log = SimpleNamespace(text=lambda *given: said.append(given))
    SampleTexts(count, decoding(), log, parallel)(4, known_buffer())
    assert [(step, name) for step, name, _ in said] == [
        (5, f"samples/{i + 1}") for i in range(min(count, 2))
    ]
    if said:
        assert said[0][2] == f"one?\n\n7 8 {EOS}\n\nreward 2.25 (verifier 0.5, rule 1)"
    if count > 1:
        assert said[1][2] == "1 5 6\n\n9\n\nreward 0.5 (verifier 1, rule 0), cut at the limit"


# --- the buffer -----------------------------------------------------------------------------------


def test_a_buffer_taken_apart_and_joined_is_the_same():
    """In any order, with all that is known, and with parts that hold nothing."""
    buffer = buffer_of([[7, 8, EOS], [9], [3, 4]], [False, True, True])
    buffer.scores, buffer.components = (
        torch.tensor([1.0, 2.0, 3.0]),
        {"a": torch.tensor([4.0, 5.0, 6.0])},
    )
    buffer.kept, buffer.logprobs = torch.arange(12, dtype=torch.uint8).view(6, 2), torch.arange(6.0)
    parts = [buffer.take([2], [0]), buffer.take([], []), buffer.take([0, 1], [1, 2])]
    assert [len(part) for part in parts] == [1, 0, 2] and parts[0].logprobs.tolist() == [4.0, 5.0]
    joined = RolloutBuffer.joined(parts)
    assert joined.places == [0, 1, 2] and joined.responses() == [[3, 4], [7, 8, EOS], [9]]
    assert joined.truncated.tolist() == [True, False, True] and joined.scores.tolist() == [
        3.0,
        1.0,
        2.0,
    ]
    assert joined.components["a"].tolist() == [6.0, 4.0, 5.0] and joined.logprobs.tolist() == [
        4.0,
        5.0,
        0.0,
        1.0,
        2.0,
        3.0,
    ]
    assert (
        joined.kept.tolist() == buffer.kept[[4, 5, 0, 1, 2, 3]].tolist() and joined.values is None
    )
