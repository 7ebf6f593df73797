"""Rollouts, rewards, truncation and the outer loop, in one process. Numbers in names: lines of docs/ppo.md."""

import inspect
from types import SimpleNamespace

import pytest
import torch

import ppo_train
from src.errors import UserError
from src.evaluation.tasks import find_task
from src.generation.engine import Completion
from src.generation.sampling import Sampling
from src.logs import RunLog
from src.models.batch import Batch, Sequence, response_logprobs, response_values
from src.ppo import trainer
from src.ppo.buffer import Prompt, RolloutBuffer
from src.ppo.fit import DEFAULT_KL_COEF, Schedule, fit, prompt_batches, read_kl_coef, write_state
from src.ppo.loss import value_loss
from src.ppo.rewards import RuleReward, VerifierReward
from src.ppo.trainer import PPOSettings
from tests.ppo.worker import TEMPERATURE, Recorder, make_ppo, prompts
from tests.trainer.tiny import EOS, ours, padded, some_sequences, theirs


def iterate(ppo, batch=None, number=0):
    recorder = Recorder(ppo)
    return ppo.iteration(number, batch or prompts(), 1e-3, 1e-3), recorder


class Scripted:
    """An engine that returns given completions."""

    def __init__(self, completions):
        self.completions = completions

    def generate(self, prompts, sampling, stop_ids, samples=None, on_tokens=None):
        return self.completions


def buffer_of(parallel, responses, truncated, prompt=(1, 5, 6)):
    tokens = torch.tensor([t for r in responses for t in (*prompt, *r)])
    return RolloutBuffer(
        tokens, [len(prompt) + len(r) for r in responses], [len(prompt)] * len(responses),
        torch.tensor(truncated), torch.zeros(sum(map(len, responses))),
    )


# --- log-probabilities ----------------------------------------------------------------------------------------------


def test_lines_1_2_one_temperature_and_the_whole_softmax_for_old_and_reference(folder, parallel):
    """Even where sampling keeps only some tokens: nothing is renormalised."""
    ppo = make_ppo(folder, parallel, sampling=Sampling(6, 0.5, top_k=3, seed=1))
    _, recorder = iterate(ppo)
    buffer, fresh = recorder.buffer, ours(folder / "policy", parallel)
    batch, index = buffer.select(list(range(len(buffer))))
    with torch.no_grad():
        for model, got in ((fresh, buffer.logprobs), (ours(folder / "reference", parallel), buffer.ref_logprobs)):
            logits = model.logits(model(batch.tokens, batch.layout)[batch.rows]).double() / 0.5
            want = logits.log_softmax(-1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)
            assert torch.allclose(got[index].double(), want, atol=1e-5)
    assert not {"top_k", "top_p"} & set(inspect.signature(ppo_train.main).parameters)


def test_line_3_everything_after_the_logits_is_fp32_in_a_bf16_run(folder, parallel):
    ppo = make_ppo(folder, parallel, torch.bfloat16)
    kept = {}
    real = ppo._score

    def spy(buffer, *rest):
        real(buffer, *rest)
        batch, index = buffer.select(list(range(len(buffer))))
        with torch.no_grad():
            logits = ppo.policy.logits(ppo.policy(batch.tokens, batch.layout)[batch.rows])
        assert logits.dtype == torch.bfloat16
        wide = (logits.double() / TEMPERATURE).log_softmax(-1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        kept["error"] = float((buffer.logprobs[index].double() - wide).abs().max())

    ppo._score = spy
    stats, recorder = iterate(ppo, number=1)
    for name in ("logprobs", "ref_logprobs", "entropy", "values", "rewards", "advantages", "returns", "scores"):
        assert getattr(recorder.buffer, name).dtype == torch.float32, name
    # bf16 log-probabilities would be off by up to 2^-7 nats; what remains is the batch's effect on the bf16 trunk
    assert kept["error"] < 0.06 and stats["skipped"] == 0
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
    """Row t predicts token t + 1: from the last prompt token, which predicts the first response token, to EOS."""
    buffer = buffer_of(parallel, [[7, 8, EOS], [EOS]], [False, False])
    batch, index = buffer.select([1, 0])
    assert batch.rows.tolist() == [2, 4 + 2, 4 + 3, 4 + 4]
    assert batch.targets.tolist() == [EOS, 7, 8, EOS]
    assert index.tolist() == [3, 0, 1, 2]
    assert batch.ends.tolist() == [3, 9]


# --- truncation -----------------------------------------------------------------------------------------------------


def test_line_9_truncation_is_read_from_the_stop_reason(folder, parallel):
    """Ended by EOS at exactly max_new_tokens is not truncated; shorter, cut by the context, is."""
    ppo = make_ppo(folder, parallel, sampling=Sampling(3, seed=0))
    ppo.engine = Scripted([Completion([7, 8, EOS], [-1.0] * 3, "stop"), Completion([7, 8], [-1.0] * 2, "length")])
    buffer = ppo._rollouts(0, [Prompt([1, 5]), Prompt([1, 6])], [0, 1], None)
    assert buffer.truncated.tolist() == [False, True]


def test_line_9_the_engine_calls_a_stop_at_the_very_last_token_a_stop(folder, parallel):
    ppo = make_ppo(folder, parallel, sampling=Sampling(1, seed=0))
    ppo.stop_ids = set(range(0, 64, 2))
    buffer = ppo._rollouts(0, [Prompt([1, 5])] * 40, list(range(40)), None)
    last = buffer.tokens.view(40, 3)[:, 2]
    assert buffer.response_lengths == [1] * 40 and {int(t) % 2 for t in last} == {0, 1}
    assert buffer.truncated.tolist() == [bool(t % 2) for t in last.tolist()]


def advantages_of(folder, parallel, policy, last_values):
    ppo = make_ppo(folder, parallel, truncated=policy, truncation_penalty=0.7, gamma=0.9, lam=0.8)
    buffer = buffer_of(parallel, [[7, 8, EOS], [9, 7, 8, 9], [9]], [False, True, True])
    generator = torch.Generator().manual_seed(0)
    for name in ("logprobs", "ref_logprobs", "values"):
        setattr(buffer, name, torch.randn(8, generator=generator))
    buffer.scores, buffer.last_values = torch.tensor([1.0, 0.5, 0.0]), torch.tensor(last_values)
    ppo._advantages(buffer)
    return buffer


@pytest.mark.parametrize("policy", ["bootstrap", "zero", "penalty"])
def test_line_10_what_follows_a_truncated_response(folder, parallel, policy):
    last_values = [5.0, 3.0, -2.0]
    buffer = advantages_of(folder, parallel, policy, last_values)
    raw, at = [], 0
    for i, (n, cut) in enumerate([(3, False), (4, True), (1, True)]):
        part = slice(at, at + n)
        kl, values = (buffer.logprobs - buffer.ref_logprobs)[part].tolist(), buffer.values[part].tolist()
        rewards = [-0.3 * k for k in kl]
        rewards[-1] += float(buffer.scores[i]) - (0.7 if cut and policy == "penalty" else 0.0)
        values.append(last_values[i] if cut and policy == "bootstrap" else 0.0)
        delta = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(n)]
        advantages = [sum(0.72 ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        assert buffer.rewards[part].tolist() == pytest.approx(rewards, rel=1e-5, abs=1e-6)
        assert buffer.returns[part].tolist() == pytest.approx([a + v for a, v in zip(advantages, values)], rel=1e-5, abs=1e-6)
        raw, at = raw + advantages, at + n
    mean = sum(raw) / 8
    std = (sum((a - mean) ** 2 for a in raw) / 8) ** 0.5
    assert buffer.advantages.tolist() == pytest.approx([(a - mean) / std for a in raw], rel=1e-4, abs=1e-5)


def test_line_11_the_value_after_eos_is_zero(folder, parallel):
    """Whatever the value model says there, NaN included; after a truncated response it counts."""
    a = advantages_of(folder, parallel, "bootstrap", [5.0, 3.0, -2.0])
    b = advantages_of(folder, parallel, "bootstrap", [torch.nan, 3.0, -2.0])
    c = advantages_of(folder, parallel, "bootstrap", [5.0, 4.0, -2.0])
    assert torch.equal(a.advantages, b.advantages) and torch.equal(a.returns, b.returns)
    assert not torch.equal(a.advantages, c.advantages)


def test_line_11_the_value_at_the_last_token_is_not_fitted(folder, parallel, monkeypatch):
    """One value per response token enters the loss, and no gradient reaches the last token's row."""
    fitted = []
    monkeypatch.setattr(trainer, "value_loss", lambda values, *rest: fitted.append(values.numel()) or value_loss(values, *rest))
    ppo = make_ppo(folder, parallel, mini_batches=1, ppo_epochs=1)
    _, recorder = iterate(ppo)
    assert sum(fitted) == sum(recorder.buffer.response_lengths)
    model, batch = ours(folder / "value", parallel), Batch.of([Sequence([1, 5, 7, 8, EOS], 2)], parallel.device)
    asked, hidden, forward = [], [], model.forward

    def keep(tokens, layout, rows):
        asked.append(rows)
        hidden.append(forward(tokens, layout, rows))
        hidden[0].retain_grad()
        return hidden[0]

    model.forward = keep
    response_values(model, batch)[0].sum().backward()
    assert asked[0][hidden[0].grad.abs().sum(-1) > 0].tolist() == [1, 2, 3]


# --- the batch as a whole -------------------------------------------------------------------------------------------


def test_line_15_a_single_rollout_is_safe(folder, parallel):
    ppo = make_ppo(folder, parallel, max_buffer_size=1, mini_batches=1)
    ppo.engine = Scripted([Completion([EOS], [-1.0], "stop")])
    stats, recorder = iterate(ppo, [Prompt([1, 5, 6], "1")])
    assert recorder.buffer.advantages.tolist() == [0.0] and stats["skipped"] == 0
    assert all(torch.isfinite(p).all() for model in (ppo.policy, ppo.value) for p in model.parameters())
    assert stats["explained_variance"] == 0.0


def test_line_18_the_logged_kl_is_not_clipped(folder, parallel):
    ppo = make_ppo(folder, parallel)
    buffer = buffer_of(parallel, [[7, 8], [9]], [False, False])
    buffer.scores, buffer.last_values = torch.zeros(2), torch.zeros(2)
    buffer.logprobs, buffer.ref_logprobs = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-50.0, 2.0, -1.0])
    for name in ("entropy", "values", "returns"):
        setattr(buffer, name, torch.zeros(3))
    stats = ppo._rollout_stats(buffer)
    assert stats["kl"] == pytest.approx((50 - 1 + 3) / 2) and stats["kl_max"] == 50


def test_line_20_the_controller_gets_the_batch_s_mean_kl_once(folder, parallel):
    ppo = make_ppo(folder, parallel)
    calls = []
    ppo.kl = SimpleNamespace(kl_coef=0.3, update=lambda *given: calls.append(given))
    stats, recorder = iterate(ppo)
    b = recorder.buffer
    assert calls == [(stats["kl"], 8)]
    assert stats["kl"] == pytest.approx(float((b.logprobs - b.ref_logprobs).sum()) / 8, rel=1e-6)


def test_line_20_the_coefficient_is_kept_beside_the_policy(tmp_path):
    assert read_kl_coef(str(tmp_path)) == DEFAULT_KL_COEF
    write_state(str(tmp_path), 0.1234567890123)
    assert read_kl_coef(str(tmp_path)) == 0.1234567890123
    for bad in ('{}', '{"kl_coef": "much"}', '{"kl_coef": -1}'):
        (tmp_path / "ppo_state.json").write_text(bad)
        with pytest.raises(UserError, match="kl_coef"):
            read_kl_coef(str(tmp_path))


@pytest.mark.parametrize("epochs, minibatches", [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_line_21_optimizer_steps_are_epochs_times_minibatches(folder, parallel, epochs, minibatches):
    ppo = make_ppo(folder, parallel, ppo_epochs=epochs, mini_batches=minibatches)
    stats, recorder = iterate(ppo)
    assert len(recorder.steps) == stats["optimizer_steps"] == epochs * minibatches
    plan = recorder.minibatches
    for epoch in range(epochs):
        part = plan[epoch * minibatches : (epoch + 1) * minibatches]
        assert sorted(i for rows in part for i in rows) == list(range(8))
        assert max(map(len, part)) - min(map(len, part)) <= 1


def test_line_21_epochs_and_iterations_are_shuffled_anew(folder, parallel):
    ppo = make_ppo(folder, parallel)
    buffer = buffer_of(parallel, [[7]] * 8, [False] * 8)
    plans = [[sorted(i for rows in m for i in rows) for m in ppo._plan(n, e, 8, buffer)] for n, e in ((0, 0), (0, 1), (1, 0))]
    assert len({str(plan) for plan in plans}) == 3
    assert ppo._plan(0, 0, 8, buffer) == ppo._plan(0, 0, 8, buffer)


def test_line_27_samples_differ_and_a_seed_reproduces_them(folder, parallel):
    def responses(seed, number=0):
        ppo = make_ppo(folder, parallel, sampling=Sampling(8, 1.0, seed=seed))
        ppo.stop_ids = {63}
        buffer = ppo._rollouts(number, [Prompt([1, 5, 6])] * 6, [number * 6 + i for i in range(6)], None)
        return [tuple(t.tolist()) for t in buffer.tokens.split(buffer.lengths)]

    first = responses(0)
    assert len(set(first)) == 6 and responses(0) == first
    assert not set(first) & set(responses(1)), "another seed draws the same"
    assert not set(first) & set(responses(0, number=1)), "the next iteration draws the same"


def test_line_27_iterations_number_their_samples_apart(folder, parallel):
    ppo, seen = make_ppo(folder, parallel), []
    generate = ppo.engine.generate
    ppo.engine.generate = lambda p, s, stop, samples, f: seen.append(samples) or generate(p, s, stop, samples, f)
    for number in (0, 1):
        ppo.iteration(number, prompts(), 1e-3, 1e-3)
    assert len(set(seen[0] + seen[1])) == 16


def test_line_28_a_reward_of_zero_is_a_reward(folder, parallel):
    ppo = make_ppo(folder, parallel)
    ppo.rewards = ppo.rewards[1:]
    stats, recorder = iterate(ppo, [Prompt(p.tokens, "7") for p in prompts()])  # never the answer
    assert stats["reward"] == stats["reward/rule"] == 0.0 and recorder.buffer.scores.tolist() == [0.0] * 8
    b = recorder.buffer
    assert torch.allclose(b.rewards, -0.3 * (b.logprobs - b.ref_logprobs), atol=1e-7)


# --- rewards --------------------------------------------------------------------------------------------------------


def test_the_verifier_s_reward_is_transformers_classifier_s(folder, parallel):
    buffer = buffer_of(parallel, [[7, 8, EOS], [9, 10, 11, 12, 13], [EOS]], [False, True, False])
    got = VerifierReward(ours(folder / "verifier", parallel))(buffer, [[2, 0], [1]], [""] * 3)
    ids, mask = padded([t.tolist() for t in buffer.tokens.split(buffer.lengths)])
    with torch.no_grad():
        want = theirs(folder / "verifier")(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    assert torch.allclose(got, want, atol=1e-5)


def test_the_rule_s_reward_is_the_grader_s(folder, parallel):
    """On the response's text alone, by the task's headline rule, up to where the task ends an answer."""
    task, texts = find_task("GSM8K"), {7: "so #### 12", 8: "it is 12", 9: "#### 13", 10: "Question: 6 + 6? #### 12"}
    tokenizer = SimpleNamespace(decode=lambda ids: texts[ids[0]])
    buffer = buffer_of(parallel, [[7, EOS], [8], [9, EOS], [10]], [False, True, False, False])
    got = RuleReward(task, tokenizer)(buffer, [[0, 1, 2, 3]], ["12"] * 4)
    assert got.tolist() == [float(task.grade(text.split("Question:")[0], "12")["official"]) for text in texts.values()]
    assert got.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert got.dtype == torch.float32


# --- the outer loop -------------------------------------------------------------------------------------------------


def schedule(**change):
    return Schedule(**dict(lr=1e-3, critic_lr=2e-3, warmup=0.0, schedule="linear", epochs=2, iterations=None,
                           samples_per_prompt=2, seed=3) | change)


class Fake:
    """Stands for a PPO and writes down what it is asked for."""

    def __init__(self):
        self.settings, self.calls = SimpleNamespace(max_buffer_size=4), []

    def iteration(self, number, batch, lr, critic_lr):
        self.calls.append((number, [p.tokens[0] for p in batch], lr, critic_lr))
        return dict.fromkeys(("reward", "kl", "entropy", "response_length", "truncated", "clipfrac", "skipped"), 0.0)


def outer(plan):
    ppo, evaluated = Fake(), []
    with RunLog(None, "test", {}, rank=1) as log:
        fit(ppo, [Prompt([i]) for i in range(5)], plan, log, evaluated.append)
    return ppo.calls, evaluated


def test_every_pass_takes_every_prompt_with_all_its_samples_in_full_batches():
    calls, evaluated = outer(schedule())
    assert [number for number, *_ in calls] == list(range(6)) and evaluated == [0, 1, 2]
    assert all(len(batch) == 4 and batch[::2] == batch[1::2] for _, batch, *_ in calls)
    drawn = [i for _, batch, *_ in calls for i in batch[::2]]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5))
    assert drawn[:5] != drawn[5:10], "not reshuffled"
    for number, _, lr, critic_lr in calls:
        assert lr == pytest.approx(1e-3 * (1 - number / 6)) and critic_lr == pytest.approx(2 * lr)


@pytest.mark.parametrize("iterations, evaluated", [(1, [0, 1]), (4, [0, 1, 2]), (8, [0, 1, 2, 3])])
def test_iterations_end_the_run_early_or_go_on(iterations, evaluated):
    calls, seen = outer(schedule(iterations=iterations))
    assert len(calls) == iterations and seen == evaluated


def test_the_prompts_order_is_the_seed_s_and_batches_are_full():
    def order(seed, n_prompts=9):
        stream = prompt_batches(n_prompts, 4, seed)
        return [next(stream) for _ in range(6)]

    assert order(1) == order(1) != order(2)
    assert all(len(batch) == 4 for n in (2, 4, 9) for batch in order(1, n))
    assert sorted(i for batch in order(1, 3) for i in batch) == sorted([0, 1, 2] * 8), "fewer prompts than a batch"


def test_line_24_defaults_are_the_recipe_s():
    flags = {name: p.default for name, p in inspect.signature(ppo_train.main).parameters.items()}
    recipe = dict(gamma=1.0, lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, ppo_epochs=4, truncated="bootstrap")
    settings = PPOSettings(max_batch_size=1, max_buffer_size=4)
    for name, value in recipe.items():
        assert flags[name] == getattr(settings, name) == value


@pytest.mark.parametrize("change", [
    {"max_batch_size": 0}, {"max_buffer_size": 0}, {"mini_batches": 0}, {"ppo_epochs": 0}, {"gamma": 1.1}, {"lam": -0.1},
    {"cliprange": 0.0}, {"cliprange_value": 0.0}, {"mini_batches": 9}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=f"--{next(iter(change))} "):
        PPOSettings(**dict(max_batch_size=4, max_buffer_size=8) | change)


@pytest.mark.parametrize("change", [
    {"lr": 0.0}, {"critic_lr": -1.0}, {"warmup": 1.0}, {"epochs": 0}, {"iterations": 0}, {"samples_per_prompt": 0}])
def test_schedules_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=f"--{next(iter(change))} "):
        schedule(**change)
