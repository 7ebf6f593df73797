"""What a policy in training answers at a step, for the objectives that learn from it."""

from collections.abc import Callable

from src.data.tokenizer import Tokenizer
from src.generation.engine import Completion, Engine, Stop, generate_sharded
from src.generation.from_settings import sampling_of
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
    engine = Engine(model, parallel, sequences_at_once, max_seq_len, generation.kv_cache_gb)
    sampling = sampling_of(generation, seed)
    stop = Stop(tokenizer.stop_ids, (), tokenizer.decode)

    def sample(prompts: list[list[int]], numbers: list[int]) -> list[Completion]:
        return generate_sharded(engine, prompts, sampling, stop, numbers)

    return sample
