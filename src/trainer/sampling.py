"""What a policy in training answers at a step, for the objectives that learn from it."""

from collections.abc import Callable

from src.data.tokenizer import Tokenizer
from src.generation.engine import Completion, Engine, Stop, generate_sharded
from src.generation.from_settings import sampling_of
from src.generation.relayout import plain
from src.generation.sampling import Sampling
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.settings.generation import GenerationSettings

# Prompts and the samples' numbers → a completion each, the same on all ranks.
Sample = Callable[[list[list[int]], list[int]], list[Completion]]


def sampler(
    model: Transformer,
    tokenizer: Tokenizer,
    generation: GenerationSettings,
    sequences_at_once: int,
    max_seq_len: int,
    seed: int,
    parallel: Parallel,
) -> Sample:
    """The model's samples. A sample's number and the seed alone say what is drawn."""
    limits = sequences_at_once, max_seq_len, generation.kv_cache_gb
    stop = Stop(tokenizer.stop_ids, (), tokenizer.decode)
    return sampling_from(model, parallel, sampling_of(generation, seed), stop, limits)


def sampling_from(
    model: Transformer,
    parallel: Parallel,
    sampling: Sampling,
    stop: Stop | set[int],
    limits: tuple[int, int, float | None],
) -> Sample:
    """`sampler` by what it comes to. limits: of `Engine`."""

    def sample(prompts: list[list[int]], numbers: list[int]) -> list[Completion]:
        with plain(model, parallel) as (whole, division):
            engine = Engine(whole, division, *limits)
            return generate_sharded(engine, prompts, sampling, stop, numbers)

    return sample
