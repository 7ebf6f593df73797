"""Requests answered by Triton's kernels, in its interpreter, as the CPU's own path answers them."""

import pytest
import torch

from src.generation.scheduler import Request
from src.kernels import runtime
from src.parallel.setup import start, stop
from tests.generation.test_session import SAMPLINGS, session_of

FAMILIES = {
    "dense": {},
    "window": dict(sliding_window=5),
    "biases and head norms": dict(qkv_bias=True, qk_norm=True),
    "tied": dict(tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def parallel():
    parallel = start(1)
    torch.set_num_threads(1)
    yield parallel
    stop()


def answers(parallel, kind: str, changes: dict) -> list[Request]:
    """Of two prompts, the second twice; one slot too few for all."""
    prompts = [[5, 3, 9], list(range(1, 20)), list(range(1, 20))]
    requests = [Request(prompt, 4, i, i) for i, prompt in enumerate(prompts)]
    settings = dict(slots=2, changes=tuple(changes.items()))
    with session_of(parallel, SAMPLINGS[kind], **settings) as session:
        for request in requests:
            session.add(request)
        while not session.is_idle:
            session.step()
    return requests


@pytest.mark.parametrize(
    "kind, family",
    [(kind, "dense") for kind in SAMPLINGS] + [("sampled", name) for name in [*FAMILIES][1:]],
)
def test_the_kernels_answer_as_the_cpu_does(parallel, monkeypatch, kind, family):
    by_kernels = answers(parallel, kind, FAMILIES[family])
    monkeypatch.setattr(runtime, "takes", lambda x: False)
    for ours, wanted in zip(by_kernels, answers(parallel, kind, FAMILIES[family])):
        assert ours.tokens == wanted.tokens
        torch.testing.assert_close(
            torch.tensor(ours.logprobs), torch.tensor(wanted.logprobs), atol=1e-4, rtol=0
        )
