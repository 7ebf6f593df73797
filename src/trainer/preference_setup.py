"""A run of preference learning put together from its settings, its inputs and its loaded policy."""

import hashlib
from typing import Any

import torch

from src.checkpoint.load import load_model, load_sharing
from src.identity import held, held_rows
from src.logs import RunLog
from src.models.batch import Sequence
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.settings.model import SCORED_AT_ONCE
from src.settings.preference import PreferenceTrainSettings
from src.trainer.fit import rows_per_step
from src.trainer.inputs import PreferenceInputs
from src.trainer.losses import Knobs
from src.trainer.online import OnlineObjective
from src.trainer.preference import Mismatched, PreferenceObjective, mismatched
from src.trainer.reference import Cache, Groups, Reference, digest_of, references
from src.trainer.sampling import sampler


def make_objective(
    settings: PreferenceTrainSettings,
    inputs: PreferenceInputs,
    policy: Transformer,
    dtype: torch.dtype,
    parallel: Parallel,
    log: RunLog,
) -> PreferenceObjective:
    """What is minimised, with its reference; policy: loaded, and not yet trained."""
    preference, batches = settings.preference, settings.batches
    share_prompts = not policy.config.n_experts
    needs_point = "kto" in preference.names
    off_prompt: list[Sequence] = []
    if needs_point:
        off_prompt = mismatched(inputs.rows, settings.run.seed, batches.max_seq_len)

    # The reference's numbers of every row, and of KTO's answers to other prompts.
    reference: Reference | None = None
    of_mismatched: Reference | None = None
    if preference.has_reference:
        lists: list[Groups] = [[row.responses for row in inputs.rows]]
        lists += [[[sequence] for sequence in off_prompt]] if needs_point else []
        cache = None
        if preference.cache_reference is not None:
            key = _key(settings, inputs, dtype, lists)
            cache = Cache(preference.cache_reference, key)

        def load() -> Transformer:
            return reference_model(inputs, policy, settings, dtype, parallel, cache is None)

        tokens = batches.max_tokens_per_batch or SCORED_AT_ONCE
        limits = settings.evaluation.eval_batch_size, tokens
        found = references(lists, cache, load, share_prompts, limits, parallel, log)
        reference, of_mismatched = found[0], found[-1]

    options: dict[str, Any] = {
        "losses": preference.weighted,
        "knobs": knobs_of(settings),
        "reference": reference,
        "parallel": parallel,
        "share_prompts": share_prompts,
    }
    if inputs.judge is not None:
        at_once, limit = settings.evaluation.eval_batch_size, batches.max_seq_len
        sampling = settings.generation, at_once, limit, settings.run.seed, parallel
        sample = sampler(policy, inputs.model.tokenizer, *sampling)
        rows = rows_per_step(batches, parallel.data_size)
        samples, judge = settings.online.samples_per_prompt, inputs.judge.load(parallel, dtype)
        return OnlineObjective(inputs.prompts, samples, rows, sample, judge, **options)
    point = None
    if needs_point and of_mismatched is not None:
        point = Mismatched(off_prompt, of_mismatched, parallel, batches.max_batch_size)
    return PreferenceObjective(inputs.rows, mismatched=point, **options)


def knobs_of(settings: PreferenceTrainSettings) -> Knobs:
    """The losses' constants, with their defaults."""
    preference, default = settings.preference, Knobs(label_smoothing=0.1)
    given = {
        name: value
        for name in (
            "label_smoothing",
            "gamma_beta_ratio",
            "desirable_weight",
            "undesirable_weight",
        )
        if (value := getattr(preference, name)) is not None
    }
    values = {**vars(default), **given, "beta": preference.constant_beta}
    return Knobs(**values)


def reference_model(
    inputs: PreferenceInputs,
    policy: Transformer,
    settings: PreferenceTrainSettings,
    dtype: torch.dtype,
    parallel: Parallel,
    stays: bool,
) -> Transformer:
    """The policy before it is trained, frozen. stays: while it is trained.

    With an adapter it is on the policy's own frozen weights: without the adapter, or with the one
    that is trained on, as it was.
    """
    start = inputs.model.checkpoint
    if inputs.lora is not None:
        return load_sharing(policy, parallel, "lm", adapter=start.adapter)
    if not stays:
        return policy
    quantize = settings.lora.quantize
    return load_model(start, parallel, dtype, "lm", settings.run.seed, quantize)


def _key(
    settings: PreferenceTrainSettings,
    inputs: PreferenceInputs,
    dtype: torch.dtype,
    lists: list[Groups],
) -> dict[str, str]:
    """What the reference's numbers depend on, each as a text."""
    model = settings.model
    paths = model.ckpt_dir, model.adapter_dir, model.config_file
    weights = [None if path is None else held(path) for path in paths]
    weights.append(str(inputs.lora is not None))  # else an adapter is added into the weights
    ids = hashlib.sha256()
    for groups in lists:
        for group in groups:
            for sequence in group:
                ids.update(f"{sequence.ranges} {list(sequence.tokens)}\n".encode())
    return {
        "model": digest_of(weights),
        "tokenizer": digest_of(inputs.model.tokenizer.identity),
        "train file": held_rows(settings.data.train_file),
        "rows or pairs of it, as tokens": ids.hexdigest(),
        "dtype": str(dtype),
        "quantisation": str(settings.lora.quantize),
        "setting of --deterministic": str(settings.run.deterministic),
        "setting of --compile": str(settings.run.compile),
    }
