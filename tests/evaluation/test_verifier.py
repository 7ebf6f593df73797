"""src/evaluation/verifier.py: scores in the rows' order, and every pair counted once."""

import pytest
import torch

from src.evaluation import verifier
from src.evaluation.verifier import evaluate_pairs, score_all
from src.logs import RunLog
from src.trainer.verifier import Comparison
from tests.trainer.tiny import ours, padded, save_llama, some_sequences, theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("verifier") / "score", "score", 1)


@pytest.fixture
def log():
    with RunLog(None, "test", {}, rank=1) as log:
        yield log


@pytest.mark.parametrize("max_batch_size", [1, 3, 64])
def test_scores_are_transformers_in_the_rows_order_at_any_batch_size(
    folder, parallel, log, max_batch_size
):
    sequences = some_sequences(9, seed=5)
    assert len({len(s.tokens) for s in sequences}) > 3
    ids, mask = padded([s.tokens for s in sequences])
    with torch.no_grad():
        want = theirs(folder)(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    got = score_all(ours(folder, parallel), parallel, sequences, max_batch_size, log)
    assert torch.allclose(got, want, atol=1e-5)


def test_accuracy_counts_every_pair_once_and_a_tie_is_not_right(parallel, log, monkeypatch):
    rows = some_sequences(8)
    comparisons = [
        Comparison.of_sides(rows[:2], rows[2:5]),
        Comparison.of_sides(rows[5:6], rows[6:7]),
        Comparison.of_sides(rows[7:], rows[7:]),
    ]
    scores = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0, 3.0, 2.0, 4.0, 4.0])

    def score_all(model, parallel, sequences, *rest):
        return scores[: len(sequences)]

    monkeypatch.setattr(verifier, "score_all", score_all)
    summary, per_row = evaluate_pairs(None, parallel, comparisons, 4, log)
    # (1, 0) against (-1, 0.5, 0): right are 1 > all three and 0 > -1; 0 = 0 is not; then 3 > 2, and
    # a tie
    assert summary == {
        "n": 3,
        "pairs": 8,
        "accuracy": 5 / 8,
        "margin": pytest.approx((3.5 + 0.5 + 1.0 + 0.0) / 8),
    }
    assert per_row == [
        {"chosen": [1.0, 0.0], "rejected": [-1.0, 0.5, 0.0]},
        {"chosen": [3.0], "rejected": [2.0]},
        {"chosen": [4.0], "rejected": [4.0]},
    ]


def test_no_gradient_is_kept_while_scoring(folder, parallel, log):
    model, seen = ours(folder, parallel), []
    forward = model.forward

    def spied(*inputs):
        seen.append(torch.is_grad_enabled())
        return forward(*inputs)

    model.forward = spied
    score_all(model, parallel, some_sequences(2), 2, log)
    assert seen == [False]
