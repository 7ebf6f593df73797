"""The engine and the sampling that a script's settings ask for."""

from src.generation.beam import BeamSearch
from src.generation.engine import Engine
from src.generation.sampling import Sampling
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.settings.generation import DecodingSettings, GenerationSettings
from src.settings.model import BatchSettings


def sampling_of(generation: GenerationSettings, seed: int) -> Sampling:
    """How tokens are chosen."""
    return Sampling(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        seed=seed,
        min_p=generation.min_p,
        repetition_penalty=getattr(generation, "repetition_penalty", 1.0),
        min_new_tokens=generation.min_new_tokens,
    )


def engine_of(
    model: Transformer, parallel: Parallel, batches: BatchSettings, decoding: DecodingSettings
) -> Engine:
    """A plain engine, or with several beams one that searches."""
    limits = batches.max_batch_size, batches.max_seq_len, decoding.kv_cache_gb
    if decoding.num_beams == 1:
        return Engine(model, parallel, *limits)
    return BeamSearch(model, parallel, *limits, decoding.num_beams, decoding.length_penalty)
