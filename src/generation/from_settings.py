"""The engine and the sampling that a script's settings ask for."""

from dataclasses import fields

from src.generation.beam import BeamSearch
from src.generation.engine import Engine
from src.generation.sampling import Sampling
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.settings.declaration import flat
from src.settings.generation import DecodingSettings, GenerationSettings
from src.settings.model import BatchSettings


def sampling_of(generation: GenerationSettings, seed: int) -> Sampling:
    """How tokens are chosen."""
    known = {f.name for f in fields(Sampling)}
    values = {name: value for name, value in flat(generation).items() if name in known}
    return Sampling(**values, seed=seed)


def engine_of(
    model: Transformer, parallel: Parallel, batches: BatchSettings, decoding: DecodingSettings
) -> Engine:
    """A plain engine, or with several beams one that searches."""
    limits = batches.max_batch_size, batches.max_seq_len, decoding.kv_cache_gb
    if decoding.num_beams == 1:
        return Engine(model, parallel, *limits)
    return BeamSearch(model, parallel, *limits, decoding.num_beams, decoding.length_penalty)
