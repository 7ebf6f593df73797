"""`target_loss`, whose gradients are taken chunk by chunk on the way forward.

It is autograd's of the whole in fp64.
"""

import pytest
import torch

from src.parallel import vocab
from src.parallel.vocab import target_loss

N, DIM, REAL, PADDING = 23, 8, 16, 3
FACTOR = 3.0
TEMPERATURES = pytest.mark.parametrize("temperature", (1.0, 0.7))


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


HIDDEN, TARGETS = drawn(N, DIM, seed=0), torch.arange(N) * 5 % REAL
# with padding that would win if it counted: [REAL + PADDING, DIM]
WEIGHT = torch.cat((drawn(REAL, DIM, seed=1), 100 + drawn(PADDING, DIM, seed=2)))
ADVANTAGES, SCALE = drawn(N, seed=3), drawn(N, seed=4).abs()


def reference_logs(hidden, weight, temperature):
    """[N, REAL] of the hidden states [N, DIM] and the weight."""
    return (hidden @ weight[:REAL].T / temperature).log_softmax(-1)


OLD = reference_logs(HIDDEN, WEIGHT, 1.0).gather(1, TARGETS[:, None])[:, 0] + 0.4 * drawn(N, seed=5)


def likelihood(logprobs, entropy, rows):
    return -logprobs.sum()


def clipped(logprobs, entropy, rows):
    ratio, advantages = (logprobs - OLD[rows]).exp(), ADVANTAGES[rows]
    gains = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(gains * SCALE[rows]).sum() / N


def clipped_with_entropy(logprobs, entropy, rows):
    return clipped(logprobs, entropy, rows) - 0.3 * (entropy * SCALE[rows]).sum()


def entropy_alone(logprobs, entropy, rows):
    return (entropy.square() * ADVANTAGES[rows]).sum()


LOSSES = {  # and whether they want entropies
    "likelihood": (likelihood, False),
    "likelihood, entropies unused": (likelihood, True),
    "clipped": (clipped, False),
    "clipped with entropy": (clipped_with_entropy, True),
    "entropy alone": (entropy_alone, True),
}
EACH_LOSS = pytest.mark.parametrize("loss", LOSSES)
# rows that fit
CHUNKS = {"one chunk": N, "a row at a time": 1, "5 5 5 5 3": 5, "8 8 7": 10, "12 11": 22}


def reference(loss, temperature):
    """The loss and the gradients of the hidden states and of the weight."""
    hidden, weight = HIDDEN.double().requires_grad_(), WEIGHT.double().requires_grad_()
    logs = reference_logs(hidden, weight, temperature)  # [N, REAL]
    logprobs, entropy = logs.gather(1, TARGETS[:, None])[:, 0], -(logs.exp() * logs).sum(-1)
    value = LOSSES[loss][0](logprobs, entropy, slice(None))
    value.backward()
    return value.detach(), hidden.grad, weight.grad


def ours(
    loss, temperature, train=(True, True), factor=1.0, hidden=HIDDEN, weight=WEIGHT, real=REAL
):
    hidden, weight = (
        x.clone().requires_grad_(wanted) for x, wanted in zip((hidden, weight), train)
    )
    loss_of, entropy = LOSSES[loss]
    value = target_loss(hidden, weight, real, TARGETS, loss_of, temperature, entropy)
    assert value.shape == () and value.dtype == torch.float32
    if any(train):
        (value * factor).backward()
    return value.detach(), hidden.grad, weight.grad


def close(results, wanted, tolerance=1e-5):
    names = ("loss", "gradient of hidden", "gradient of the weight")
    for name, a, b in zip(names, results, wanted, strict=True):
        assert a.shape == b.shape, name
        difference = float((a.double() - b).abs().max())
        assert difference <= tolerance * (1e-3 + float(b.abs().max())), name


@TEMPERATURES
@EACH_LOSS
def test_loss_and_gradients(parallel, loss, temperature):
    close(ours(loss, temperature), reference(loss, temperature))


def test_the_clipped_loss_clips_some_rows_and_not_others(parallel):
    """Else the tests here would not see what a row that is clipped does."""
    _, grad, _ = ours("clipped", 1.0)
    rows = grad.abs().sum(-1) > 0
    assert 3 < int(rows.sum()) < N - 3


@pytest.mark.parametrize("chunks", CHUNKS)
@TEMPERATURES
@EACH_LOSS
def test_chunks_change_nothing(parallel, monkeypatch, loss, temperature, chunks):
    whole = ours(loss, temperature)
    monkeypatch.setattr(vocab, "LOGITS_AT_ONCE", CHUNKS[chunks] * len(WEIGHT) + 1)
    close(ours(loss, temperature), [x.double() for x in whole], 2e-6)
    close(ours(loss, temperature), reference(loss, temperature))


@pytest.mark.parametrize("chunks", CHUNKS)
def test_each_row_is_given_once_and_no_more_at_once_than_fit(parallel, monkeypatch, chunks):
    monkeypatch.setattr(vocab, "LOGITS_AT_ONCE", CHUNKS[chunks] * len(WEIGHT) + 1)
    seen = []

    def record(logprobs, entropy, rows):
        assert entropy is None and logprobs.shape == TARGETS[rows].shape
        seen.append((rows, logprobs.detach().clone()))
        return logprobs.sum()

    target_loss(HIDDEN, WEIGHT, REAL, TARGETS, record)
    assert [i for rows, _ in seen for i in range(N)[rows]] == list(range(N))
    sizes = [len(logprobs) for _, logprobs in seen]
    assert max(sizes) <= CHUNKS[chunks]
    assert " ".join(map(str, sizes)) == chunks or CHUNKS[chunks] in (1, N)
    wanted = reference_logs(HIDDEN.double(), WEIGHT.double(), 1.0).gather(1, TARGETS[:, None])[:, 0]
    assert torch.allclose(torch.cat([logprobs for _, logprobs in seen]).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("size", (1, N))
@EACH_LOSS
def test_padded_entries_have_probability_zero_and_no_gradient(parallel, monkeypatch, loss, size):
    monkeypatch.setattr(vocab, "LOGITS_AT_ONCE", size * len(WEIGHT))
    value, hidden, weight = ours(loss, 0.7)
    assert not weight[REAL:].any() and weight[:REAL].any(-1).all()
    bare = ours(loss, 0.7, weight=WEIGHT[:REAL])
    close((value, hidden, weight[:REAL]), [x.double() for x in bare], 2e-6)


@pytest.mark.parametrize("size", (5, N))
@EACH_LOSS
def test_holes_have_probability_zero_and_no_gradient(parallel, monkeypatch, loss, size):
    """Rows that would win if they counted, among the others: as if they were not there."""
    monkeypatch.setattr(vocab, "LOGITS_AT_ONCE", size * len(WEIGHT))
    holes, places = [(2, 4), (9, 10)], [i for i in range(REAL + 3) if i not in (2, 3, 9)]
    weight = 100 + drawn(REAL + 3 + PADDING, DIM, seed=6)
    weight[places] = WEIGHT[:REAL]
    weight.requires_grad_()
    hidden, (loss_of, entropy) = HIDDEN.clone().requires_grad_(), LOSSES[loss]
    targets = torch.tensor(places)[TARGETS]
    options = dict(temperature=0.7, entropy=entropy, holes=holes)
    value = target_loss(hidden, weight, REAL + 3, targets, loss_of, **options)
    value.backward()
    bare = ours(loss, 0.7, weight=WEIGHT[:REAL])
    results = value.detach(), hidden.grad, weight.grad[places]
    close(results, [x.double() for x in bare], 2e-6)
    assert not weight.grad[[2, 3, 9, *range(REAL + 3, len(weight))]].any()


@EACH_LOSS
def test_real_alone_says_what_is_padding(parallel, loss):
    """Rows of zeros count when they are real: their logits are 0, not nothing."""
    zeros = torch.cat((WEIGHT[:REAL], torch.zeros(PADDING, DIM)))
    counted = ours(loss, 1.0, weight=zeros, real=len(zeros))
    uncounted = ours(loss, 1.0, weight=zeros)
    assert counted[2][REAL:].any(-1).all() and abs(float(counted[0] - uncounted[0])) > 1e-3


@pytest.mark.parametrize("size", (5, N))
@EACH_LOSS
def test_what_is_frozen_has_no_gradient_and_the_other_the_same(parallel, monkeypatch, loss, size):
    monkeypatch.setattr(vocab, "LOGITS_AT_ONCE", size * len(WEIGHT))
    value, hidden, weight = reference(loss, 1.0)
    of_hidden = ours(loss, 1.0, train=(True, False))
    of_weight = ours(loss, 1.0, train=(False, True))
    neither = ours(loss, 1.0, train=(False, False))
    assert of_hidden[2] is None and of_weight[1] is None and neither[1:] == (None, None)
    for our_value, *_ in (of_hidden, of_weight, neither):
        close((our_value, of_hidden[1], of_weight[2]), (value, hidden, weight))


@pytest.mark.parametrize("size", (5, N))
@EACH_LOSS
def test_a_factor_from_above_scales_the_gradients(parallel, monkeypatch, loss, size):
    monkeypatch.setattr(vocab, "LOGITS_AT_ONCE", size * len(WEIGHT))
    value, hidden, weight = reference(loss, 0.7)
    close(ours(loss, 0.7, factor=FACTOR), (value, FACTOR * hidden, FACTOR * weight))


def test_gradients_add_to_what_is_there_and_the_inputs_stay(parallel):
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    for _ in range(2):
        (target_loss(hidden, weight, REAL, TARGETS, likelihood) + weight.sum()).backward()
    value, grad_hidden, grad_weight = reference("likelihood", 1.0)
    close((value, hidden.grad, weight.grad), (value, 2 * grad_hidden, 2 * grad_weight + 2))
    assert torch.equal(hidden.detach(), HIDDEN) and torch.equal(weight.detach(), WEIGHT)


def test_without_gradients_only_the_loss_is_computed(parallel):
    with torch.no_grad():
        value = target_loss(HIDDEN.clone().requires_grad_(), WEIGHT, REAL, TARGETS, clipped)
    assert not value.requires_grad
    assert float(value) == pytest.approx(float(reference("clipped", 1.0)[0]), rel=1e-5)


@pytest.mark.parametrize("size", (5, N))
@EACH_LOSS
def test_bf16(parallel, monkeypatch, loss, size):
    """Logits and their gradients are rounded to 8 bits, sums over chunks are not."""
    monkeypatch.setattr(vocab, "LOGITS_AT_ONCE", size * len(WEIGHT))
    hidden, weight = HIDDEN.bfloat16(), WEIGHT.bfloat16()
    rounded = ours(loss, 1.0, hidden=hidden, weight=weight)
    assert rounded[1].dtype == rounded[2].dtype == torch.bfloat16
    exact = ours(loss, 1.0, hidden=hidden.float(), weight=weight.float())
    close(rounded, [x.double() for x in exact], 3e-2)
