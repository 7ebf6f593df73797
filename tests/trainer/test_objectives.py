"""What the solver's and the verifier's losses count, against formulas written here."""

import math

import numpy as np
import pytest
import torch

from src.data.encoding import Comparison
from src.models.batch import (
    Batch,
    Sequence,
    packed,
    response_logprobs,
    response_loss,
    sequence_scores,
)
from src.parallel import vocab
from src.trainer.optimizer import Optimizer
from src.trainer.solver import SolverObjective
from src.trainer.verifier import VerifierObjective, margins
from tests.trainer.tiny import (
    EOS,
    PAD,
    VOCAB,
    ours,
    padded,
    some_conversations,
    some_sequences,
    theirs,
)


@pytest.mark.parametrize("rows_of", [some_sequences, some_conversations])
def test_the_loss_is_the_sum_over_response_tokens_from_the_first_to_eos(folder, parallel, rows_of):
    """Divided by the batch's denominator, not by the micro-batch's own count."""
    sequences = rows_of(5, seed=3)
    objective = SolverObjective(sequences, parallel.device)
    loss, _ = objective.loss(ours(folder / "lm", parallel), [0, 2, 4], denominator=100)
    total, model = 0.0, theirs(folder / "lm")
    for s in (sequences[i] for i in (0, 2, 4)):
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([s.tokens])).logits[0].log_softmax(-1)
        places = [t for start, stop in s.ranges for t in range(start, stop)]
        total -= sum(float(logp[t - 1, s.tokens[t]]) for t in places)
        assert s.tokens[-1] == EOS
    assert float(loss.detach()) == pytest.approx(total / 100, rel=1e-5)
    assert objective.weights == [sum(b - a for a, b in s.ranges) for s in sequences]
    assert objective.lengths == [len(s.tokens) for s in sequences]


def test_a_prompt_computed_once_changes_nothing_of_conversations(folder, parallel):
    """Responses of one prompt with others' tokens between theirs, as a tree and one by one."""
    model, prompt = ours(folder / "lm", parallel), [1, 40, 41, 7]
    tails = ([9, 8, 7, EOS, 5], [12, EOS], [9, 8, EOS, 30, 31, EOS])
    spans = ([(4, 5), (7, 8)], [(4, 6)], [(4, 7), (9, 10)])
    group = [Sequence.of_spans(prompt + tail, x) for tail, x in zip(tails, spans)]
    assert [s.spans is None for s in group] == [False, True, False]
    tree = packed([group, [group[0]]], True, parallel.device)
    with torch.no_grad():
        together, _ = response_logprobs(model, tree)
        alone = [response_logprobs(model, Batch.of([s], parallel.device))[0] for s in group]
    assert len(tree.tokens) == 4 + sum(map(len, tails)) + len(group[0].tokens)
    assert tree.responses == [2, 2, 4, 2]
    assert torch.allclose(together, torch.cat([*alone, alone[0]]), atol=1e-5)


def test_only_the_rows_before_response_tokens_are_trained(folder, parallel):
    """Exactly the positions that predict the first response token up to EOS.

    Neither the prompt's nor what follows EOS.
    """
    model, sequences = (
        ours(folder / "lm", parallel),
        [Sequence([1, 5, 6, 7, 8, EOS], 3), Sequence([1, 9, EOS], 2)],
    )
    asked, hidden = [], []
    forward = model.forward

    def keep(tokens, layout, rows):
        asked.append(rows.tolist())
        hidden.append(forward(tokens, layout, rows))
        hidden[0].retain_grad()
        return hidden[0]

    model.forward = keep
    SolverObjective(sequences, parallel.device).loss(model, [0, 1], 1)[0].backward()
    assert asked == [[2, 3, 4, 6 + 1]] and bool((hidden[0].grad.abs().sum(-1) > 0).all())


def test_a_prompt_s_tokens_are_no_targets(folder, parallel):
    """A token that only the prompt holds gets no pull upwards.

    Its output row's gradient is that of a token never seen.
    """
    model = ours(folder / "lm", parallel)
    sequence = Sequence([1, 40, 41, 7, EOS], 3)
    SolverObjective([sequence], parallel.device).loss(model, [0], 1)[0].backward()
    with torch.no_grad():
        logp = (
            theirs(folder / "lm")(input_ids=torch.tensor([sequence.tokens]))
            .logits[0]
            .log_softmax(-1)
        )
        batch = Batch.of([sequence], parallel.device)
        hidden = model(batch.tokens, batch.layout)[2:4]
    # d(-log p_target) / d logit = p - 1[target]: of all tokens only 7 and EOS have the -1
    expected = torch.zeros(VOCAB, hidden.size(1))
    for row, target, h in ((2, 7, hidden[0]), (3, EOS, hidden[1])):
        p = logp[row].exp()
        p[target] -= 1
        expected += p.unsqueeze(1) * h
    assert torch.allclose(model.output.weight.grad, expected, atol=1e-5)


def test_training_makes_the_whole_response_with_its_eos_likelier(folder, parallel):
    model, sequence = ours(folder / "lm", parallel), Sequence([1, 40, 41, 7, 8, EOS], 3)
    objective, optimizer = SolverObjective([sequence], parallel.device), Optimizer(model, parallel)
    batch = Batch.of([sequence], parallel.device)
    before = response_logprobs(model, batch)[0].detach()
    for _ in range(10):
        optimizer.backward(objective.loss(model, [0], 3)[0])
        optimizer.step(3e-3)
    after = response_logprobs(model, batch)[0].detach()
    assert after.numel() == 3 and bool((after > before + 0.5).all()), (
        "the first token, the second, and EOS"
    )


@pytest.mark.parametrize("at_once", [1, 3, 4, 100])
def test_training_sees_scoring_s_log_probabilities_bit_for_bit_in_whatever_chunks(
    folder, parallel, monkeypatch, at_once
):
    model, batch = (
        ours(folder / "lm", parallel),
        Batch.of(some_sequences(5, seed=3), parallel.device),
    )
    monkeypatch.setattr(vocab, "LOGITS_AT_ONCE", at_once * model.vocabulary_weight.size(0))
    with torch.no_grad():
        logprobs, entropy = response_logprobs(model, batch, 0.7)
    seen = []

    def loss_of(logprobs, entropy, rows):
        seen.append((rows, logprobs.detach().clone(), entropy.detach().clone()))
        return logprobs.sum()

    response_loss(model, batch, loss_of, 0.7, entropy=True)
    assert torch.equal(torch.cat([x for _, x, _ in seen]), logprobs)
    assert torch.equal(torch.cat([x for _, _, x in seen]), entropy)
    assert max(len(x) for _, x, _ in seen) <= at_once


class Scores:
    """A model whose score is a given number for each sequence; it counts its forwards."""

    def __init__(self, values):
        self.values, self.forwards = torch.tensor(values, requires_grad=True), 0

    def __call__(self, tokens, layout, rows):
        self.forwards += 1
        self.rows = len(rows)
        return self.values[: self.rows].unsqueeze(1)

    def scores(self, hidden):
        return hidden.squeeze(-1)


def test_the_pairwise_loss_with_several_on_each_side_in_one_forward(parallel):
    sizes = [(1, 1), (2, 3), (3, 1)]
    rows = [
        Comparison.of_sides(some_sequences(c, seed=c), some_sequences(r, seed=10 + r))
        for c, r in sizes
    ]
    values = np.random.default_rng(0).normal(0, 2, sum(c + r for c, r in sizes)).astype(np.float32)
    objective, model = VerifierObjective(rows, parallel.device), Scores(values)
    loss, stats = objective.loss(model, [0, 1, 2], denominator=5)
    expected, correct, at = 0.0, 0.0, 0
    for c, r in sizes:
        chosen, rejected, at = values[at : at + c], values[at + c : at + c + r], at + c + r
        losses = [math.log(1 + math.exp(-(float(x) - float(y)))) for x in chosen for y in rejected]
        expected += sum(losses) / len(losses)
        correct += sum(x > y for x in chosen for y in rejected) / len(losses)
    assert float(loss.detach()) == pytest.approx(expected / 5, rel=1e-6)
    assert stats["accuracy"] == pytest.approx(correct / 5, rel=1e-6)
    assert model.forwards == 1 and model.rows == sum(c + r for c, r in sizes)
    loss.backward()
    lone = (
        1 / (1 + math.exp(float(values[0] - values[1]))) / 5
    )  # d -log sigmoid(m) / dm = -sigmoid(-m)
    assert model.values.grad[:2].tolist() == pytest.approx([-lone, lone], rel=1e-5)


def test_a_tie_is_not_right_and_far_margins_stay_finite(parallel):
    one = some_sequences(1)
    objective = VerifierObjective([Comparison.of_sides(one, one)], parallel.device)
    loss, stats = objective.loss(Scores([0.5, 0.5]), [0], 1)
    assert stats["accuracy"] == 0 and float(loss.detach()) == pytest.approx(math.log(2))
    loss, _ = objective.loss(Scores([-500.0, 500.0]), [0], 1)
    assert float(loss.detach()) == pytest.approx(1000)


def test_margins_pair_every_chosen_with_every_rejected():
    a = some_sequences(5)
    compared = [Comparison.of_sides(a[:1], a[1:3]), Comparison.of_sides(a[3:4], a[4:])]
    pairs = margins(torch.tensor([5.0, 1.0, 2.0, 10.0, 7.0]), compared)
    assert [p.tolist() for p in pairs] == [[4.0, 3.0], [3.0]]


def test_the_score_is_read_at_the_last_token(folder, parallel):
    """As transformers' classifier does on a padded batch."""
    sequences = some_sequences(6, seed=4)
    ids, mask = padded([s.tokens for s in sequences])
    assert (ids == PAD).any()
    with torch.no_grad():
        want = theirs(folder / "score")(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        got = sequence_scores(
            ours(folder / "score", parallel), Batch.of(sequences, parallel.device)
        )
    assert torch.allclose(got, want, atol=1e-5)


def test_a_solver_s_new_score_head_is_normal_with_variance_one_over_dim_plus_one(folder, parallel):
    heads = [
        ours(folder / "lm", parallel, head="score", seed=seed).score.weight.detach()
        for seed in range(100)
    ]
    drawn = torch.cat(heads).flatten()
    dim = heads[0].numel()
    assert float(drawn.std()) == pytest.approx((dim + 1) ** -0.5, rel=0.05)
    assert abs(float(drawn.mean())) < 4 * (dim + 1) ** -0.5 / drawn.numel() ** 0.5
    again = ours(folder / "lm", parallel, head="score", seed=0).score.weight
    assert torch.equal(again, heads[0]) and not torch.equal(heads[0], heads[1])
    assert not any(
        "bias" in name for name, _ in ours(folder / "lm", parallel, head="score").named_parameters()
    )
