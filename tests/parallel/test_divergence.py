"""Divergences between a student's and a teacher's next tokens, beside TRL's and whole softmaxes."""

import pytest
import torch
import torch.nn.functional as F

from src.parallel import vocab
from src.parallel.divergence import coarse_divergence, distilled, head_logits, top_k
from src.parallel.setup import start, stop
from src.parallel.vocab import IMPOSSIBLE

N, DIM, TEACHER_DIM, VOCAB, REAL = 13, 8, 5, 24, 22
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    yield start(1)
    stop()


def tensors(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states and output layers of a student and a teacher."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (N, DIM), (VOCAB, DIM), (N, TEACHER_DIM), (VOCAB, TEACHER_DIM)
    return tuple(torch.randn(size, generator=generator) for size in sizes)


def trl_loss(student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: float):
    """GKDTrainer's, summed over the tokens."""
    from trl.experimental.gkd import GKDTrainer

    logits = student.unsqueeze(0), teacher.unsqueeze(0)
    return GKDTrainer.generalized_jsd_loss(
        *logits, beta=beta, temperature=temperature, reduction="sum"
    )


def masked(z: torch.Tensor) -> torch.Tensor:
    """Logits without the padding, and without one hole."""
    return torch.cat((z[:, :4], z[:, 6:REAL]), 1)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_loss_and_gradients_are_trl_s_in_whatever_chunks(monkeypatch, beta, temperature, at_once):
    monkeypatch.setattr(vocab, "LOGITS_AT_ONCE", 2 * at_once * VOCAB)
    hidden, weight, of_teacher, head = tensors()
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = distilled(*ours, REAL, head_logits(of_teacher, head), beta, temperature, [(4, 6)])
    (3 * loss).backward()
    theirs = [x.clone().double().requires_grad_() for x in (hidden, weight)]
    teacher = masked((of_teacher @ head.t()).double())
    want = trl_loss(masked(F.linear(*theirs)), teacher, beta, temperature)
    (3 * want).backward()
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    for x, y in zip(ours, theirs):
        assert torch.allclose(x.grad, y.grad.float(), rtol=1e-4, atol=1e-5)
    assert not ours[1].grad[REAL:].any() and not ours[1].grad[4:6].any()


def test_no_chunk_has_more_logits_than_it_may(monkeypatch):
    """Of both models together."""
    monkeypatch.setattr(vocab, "LOGITS_AT_ONCE", 6 * VOCAB)
    hidden, weight, of_teacher, head = tensors()
    asked, logits = [], head_logits(of_teacher, head)

    def seen(rows: slice) -> torch.Tensor:
        asked.append(rows.stop - rows.start)
        return logits(rows)

    distilled(hidden.requires_grad_(), weight, REAL, seen, 0.0)
    assert sum(asked) == N and max(asked) <= 3


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_equal_models_are_at_no_distance_and_stay(beta):
    hidden, weight, *_ = tensors()
    x = hidden.clone().requires_grad_()
    loss = distilled(x, weight, REAL, head_logits(hidden, weight), beta)
    loss.backward()
    assert abs(float(loss)) < 1e-5 and float(x.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_what_is_known_of_all_tokens_is_the_whole_divergence(beta):
    """With all but nothing in the rest; and with fewer known it is less."""
    generator = torch.Generator().manual_seed(1)
    z_p, z_q = (torch.randn(N, 20, generator=generator).double() for _ in range(2))
    whole = float(trl_loss(z_p, z_q, beta, 1.0))
    log_p, log_q = z_p.log_softmax(-1), z_q.log_softmax(-1)
    assert float(coarse_divergence(log_p, log_q, beta).sum()) == pytest.approx(whole, rel=1e-4)
    ids = z_q.topk(4).indices
    parts = [coarse_divergence(x.gather(-1, ids), y.gather(-1, ids), beta).sum()
             for x, y in ((log_p, log_q),)]  # fmt: skip
    assert 0 < float(parts[0]) < whole


@pytest.mark.parametrize("k", [1, 3, 24])
def test_several_targets_of_a_row_have_their_gradients(k):
    """`target_loss` with k tokens a row, beside autograd through a whole softmax."""
    hidden, weight, *_ = tensors(2)
    targets = torch.stack([torch.randperm(REAL)[: min(k, REAL)] for _ in range(N)])
    scale = torch.randn(targets.shape)
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = vocab.target_loss(
        *ours, REAL, targets, lambda logprobs, h, rows: (logprobs * scale[rows]).square().sum()
    )
    loss.backward()
    theirs = [x.clone().requires_grad_() for x in (hidden, weight)]
    z = F.linear(*theirs)
    z = torch.cat((z[:, :REAL], torch.full((N, VOCAB - REAL), IMPOSSIBLE)), 1)
    want = (z.log_softmax(-1).gather(-1, targets) * scale).square().sum()
    want.backward()
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    for x, y in zip(ours, theirs):
        assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-4)


def test_the_likeliest_tokens_are_torch_s():
    logits = torch.randn(N, VOCAB)
    ids, logprobs = top_k(logits.clone(), 5)
    values, places = logits.log_softmax(-1).topk(5)
    assert torch.equal(ids, places) and torch.allclose(logprobs, values, atol=1e-6)
