"""The engine on the device: its samplers, its log-probabilities, its graphs."""

from dataclasses import replace

import pytest
import torch

from src.checkpoint.load import put
from src.generation.engine import Engine
from src.generation.sampling import Sampling
from src.models.batch import Batch, Sequence, response_logprobs
from src.models.config import ModelConfig
from src.models.transformer import build
from tests.gpu.models import LLAMA, MODELS, made_prompt, model_of

SAMPLERS = {
    "greedy": Sampling(max_new_tokens=16, temperature=0.0),
    "all": Sampling(max_new_tokens=16),
    "top-p": Sampling(max_new_tokens=16, temperature=0.9, top_p=0.8),
    "top-k and min-p": Sampling(max_new_tokens=16, top_k=20, min_p=0.01),
    "penalty and a least length": Sampling(
        max_new_tokens=16, repetition_penalty=1.3, min_new_tokens=6
    ),
}
STOPS = set(range(2, 40))
# more prompts than slots, of several lengths, three of them the same
PROMPTS = [made_prompt(i, 5 + 3 * (i % 7)) for i in (*range(12), 4, 4)]
SLOTS = 5


def engine_of(model, parallel) -> Engine:
    return Engine(model, parallel, SLOTS, 128, kv_cache_gb=0.1)


def chain(parallel):
    """A model whose logits are a row of a table, by the last token: exact on any device.

    Its blocks add nothing, and its embedding is the identity.
    """
    size = 256
    config = ModelConfig(size, 1, 4, 2, 64, 64, size, max_seq_len=512)
    model = build(config, 0, 1, torch.float32)
    model.stack_projections(parallel.device)
    table = 2 * torch.randn(size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for name, weight in list(model.named_parameters()):
            value = torch.zeros(weight.shape) if weight.dim() > 1 else torch.ones(weight.shape)
            if name == "tok_embeddings.weight":
                value = torch.eye(size)
            elif name == "output.weight":
                value = table / size**0.5  # what the last norm makes of a row of the identity
            put(model, name, value, parallel.device)
    return model.eval()


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_what_they_draw_on_the_cpu(parallel, cpu, name):
    prompts = [[1 + token % 255 for token in prompt] for prompt in PROMPTS]
    ours, wanted = (
        engine_of(chain(where), where).generate(prompts, SAMPLERS[name], STOPS)
        for where in (parallel, cpu)
    )
    assert [c.tokens for c in ours] == [c.tokens for c in wanted]
    assert [c.stop_reason for c in ours] == [c.stop_reason for c in wanted]
    for one, other in zip(ours, wanted):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "dtype, mean, most",
    ((torch.float32, 1e-4, 2e-3), (torch.bfloat16, 3e-2, 0.5)),
    ids=("fp32", "bf16"),
)
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_gives_what_the_engine_said(parallel, cpu, name, dtype, mean, most):
    """Log-probabilities of what was drawn, by one forward on the CPU in fp32."""
    config = MODELS[name]
    model = model_of(config, parallel, dtype)
    completions = engine_of(model, parallel).generate(PROMPTS, SAMPLERS["all"], STOPS)
    batch = Batch.of(
        [Sequence(p + c.tokens, len(p)) for p, c in zip(PROMPTS, completions)], cpu.device
    )
    with torch.no_grad():
        wanted, _ = response_logprobs(model_of(config, cpu, rounded=dtype), batch)
    said = torch.tensor([logprob for c in completions for logprob in c.logprobs])
    error = (said - wanted).abs()
    if config.n_experts and dtype == torch.bfloat16:  # another expert, by rounding
        mean, most = 3 * mean, 3 * most
    assert error.mean() <= mean and error.max() <= most, (error.mean(), error.max())


def test_tokens_do_not_depend_on_the_neighbours(parallel):
    """In fp32, where no product's kernel makes a difference that sampling could see."""
    engine = engine_of(model_of(LLAMA, parallel), parallel)
    sampling, ids = SAMPLERS["all"], list(range(len(PROMPTS)))
    together = engine.generate(PROMPTS, sampling, STOPS, ids)
    for i in (0, 4, 12):
        (alone,) = engine.generate([PROMPTS[i]], sampling, STOPS, [i])
        assert alone.tokens == together[i].tokens


def test_graphs_change_no_token(device, parallel):
    engine = engine_of(model_of(LLAMA, parallel, torch.bfloat16), parallel)
    if not hasattr(engine, "use_graphs"):
        pytest.skip("the engine has no CUDA graphs yet")
    if device.type == "cpu":
        pytest.skip("CUDA graphs are the GPU's")
    results = []
    for graphs in (True, False):
        engine.use_graphs = graphs
        for sampling in SAMPLERS.values():
            done = engine.generate(PROMPTS, sampling, STOPS)
            results.append([(c.tokens, c.logprobs) for c in done])
    assert results[: len(SAMPLERS)] == results[len(SAMPLERS) :]


def test_a_penalty_counts_the_prompt(parallel):
    """What stands in the prompt is less likely, on the device as anywhere."""
    model = chain(parallel)
    likely = int((model.output.weight[:, 7]).argmax())
    greedy = replace(SAMPLERS["greedy"], max_new_tokens=1)
    penalised = replace(greedy, repetition_penalty=10.0)
    engine = engine_of(model, parallel)
    (plain,), (other,) = (
        engine.generate([[likely, 7]], sampling, set()) for sampling in (greedy, penalised)
    )
    assert plain.tokens == [likely] != other.tokens
