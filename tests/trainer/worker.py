"""Every check of the trainers that needs ranks, on the ranks that started it.

The results are asserted on by pytest.

    torchrun --nproc_per_node N tests/trainer/worker.py FOLDER MP_SIZE [MP_SIZE ...]

FOLDER holds the models `lm` and `score`; FOLDER/N-MP.pt gets the results of each division of the N
ranks. MP_SIZE:STAGES makes a pipeline, for what is in `PIPELINED` and `DEEP_RUNS`: N-MP-STAGES.pt.
MP_SIZE:STAGES:RANKS lets so many divide the tokens, for `IN_CONTEXT`: N-MP-STAGES-RANKS.pt.
"""

import itertools
import random
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from src.checkpoint.source import Checkpoint
from src.data.encoding import Comparison
from src.evaluation.logprobs import score_responses
from src.evaluation.verifier import evaluate_pairs
from src.generation.relayout import plain
from src.generation.sampling import Sampling
from src.logs import RunLog
from src.models.batch import Sequence
from src.models.lora import LoRAConfig
from src.models.transformer import Transformer
from src.parallel import vocab
from src.parallel.setup import Parallel, start, stop
from src.parallel.sharding import own, whole
from src.planner.measure import most_allocated
from src.settings.declaration import build
from src.settings.distillation import DistillTrainSettings
from src.settings.preference import PAIR_LOSSES
from src.settings.scripts import TrainSettings
from src.trainer.activations import gathered_bytes
from src.trainer.averages import Method
from src.trainer.budget import training_budget
from src.trainer.distillation import Distance, DistillationObjective, KeptTeacher
from src.trainer.distillation_setup import load_teacher
from src.trainer.fit import fit
from src.trainer.losses import Knobs
from src.trainer.optimizer import Optimizer
from src.trainer.preference import Mismatched, PreferenceObjective, mismatched
from src.trainer.reference import KeptReference, LiveReference, score_all
from src.trainer.sampling import sampling_from
from src.trainer.solver import SolverObjective
from src.trainer.verifier import VerifierObjective
from tests.trainer.tiny import (
    EOS,
    VOCAB,
    ours,
    some_conversations,
    some_sequences,
    training,
    whole_weights,
)

# Five steps, the last of five rows: uneven at any number of ranks.
ROWS, BATCH, LR, WARMUP = 37, 8, 2e-3, 0.5
WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 0.5
LORA, LORA_SEED = LoRAConfig(rank=4, alpha=8.0), 3
SEED = 5

# name: (model, micro-batches per step at one data-parallel rank, LoRA, more settings: of the
# model, the optimizer, or fit)
SOLVER_RUNS = {
    "full": ("lm", 1, False, {}),
    "full, zero 0": ("lm", 1, False, {"zero": 0}),
    "full, micro-batches, recomputed": ("lm", 3, False, {"recompute": "full"}),
    "full, recomputed in part": ("lm", 2, False, {"recompute": "selective"}),
    "full, packed by tokens": ("lm", 1, False, {"max_tokens": 25}),
    "full, sequence parallel, micro-batches, recomputed": (
        "lm",
        3,
        False,
        {"sequence_parallel": True, "recompute": "full", "zero": 0},
    ),
    "full, zero 2, micro-batches, recomputed": ("lm", 3, False, {"zero": 2, "recompute": "full"}),
    "full, zero 3, micro-batches, recomputed in part, sequence parallel": (
        "lm",
        3,
        False,
        {"zero": 3, "recompute": "selective", "sequence_parallel": True},
    ),
    "full, zero 3, packed by tokens": ("lm", 1, False, {"zero": 3, "max_tokens": 25}),
    "full, zero 3, in host memory, recomputed": (
        "lm",
        2,
        False,
        {"zero": 3, "offload": True, "recompute": "full"},
    ),
    "lora": ("lm", 1, True, {}),
    "lora, zero 3, micro-batches": ("lm", 6, True, {"zero": 3}),
    "lora, zero 0, packed by tokens": ("lm", 1, True, {"zero": 0, "max_tokens": 40}),
    "lora, micro-batches": ("lm", 6, True, {}),
    "experts": ("experts", 1, False, {}),
    "experts, micro-batches, recomputed": ("experts", 3, False, {"recompute": "full"}),
    "experts, lora": ("experts", 2, True, {}),
    "experts, zero 2, recomputed": ("experts", 3, False, {"zero": 2, "recompute": "full"}),
    "experts, lora, zero 3": ("experts", 2, True, {"zero": 3}),
    "experts, sequence parallel": ("experts", 1, False, {"sequence_parallel": True}),
    "experts, lora, sequence parallel, recomputed": (
        "experts",
        2,
        True,
        {"sequence_parallel": True, "recompute": "selective"},
    ),
}
# Other optimizers and places of its state; the first three do what plain AdamW does.
IN_HOST, ON_CPU = Method(offload=True), Method(offload=True, on_cpu=True)
METHOD_RUNS = {
    "full, state in host memory": ("lm", 1, False, {"method": IN_HOST}),
    "lora, state in host memory, micro-batches, recomputed": (
        "lm",
        3,
        True,
        {"method": IN_HOST, "recompute": "full", "sequence_parallel": True},
    ),
    "full, zero 0, updated on the CPU": ("lm", 1, False, {"zero": 0, "method": ON_CPU}),
    "full, updated on the CPU": ("lm", 1, False, {"method": ON_CPU}),
    "full, zero 3, state in host memory": ("lm", 1, False, {"zero": 3, "method": IN_HOST}),
    "full, zero 2, updated on the CPU": ("lm", 1, False, {"zero": 2, "method": ON_CPU}),
    "lora, state in host memory": ("lm", 1, True, {"method": IN_HOST}),
    "muon": ("lm", 1, False, {"method": Method("muon")}),
    "muon, zero 0": ("lm", 1, False, {"zero": 0, "method": Method("muon")}),
    "muon, zero 2": ("lm", 1, False, {"zero": 2, "method": Method("muon")}),
    "muon, zero 3, state in host memory": (
        "lm",
        1,
        False,
        {"zero": 3, "method": Method("muon", offload=True)},
    ),
    "muon, zero 3, weights in host memory": (
        "lm",
        1,
        False,
        {"zero": 3, "offload": True, "method": Method("muon")},
    ),
    "muon of experts": ("experts", 1, False, {"method": Method("muon")}),
    "muon of experts, zero 3": ("experts", 1, False, {"zero": 3, "method": Method("muon")}),
    "muon of adapters": ("lm", 1, True, {"method": Method("muon")}),
    "muon of adapters, zero 3": ("lm", 1, True, {"zero": 3, "method": Method("muon")}),
}
VERIFIER_RUNS = {
    "verifier": (1, True, {}),
    "verifier, micro-batches": (4, True, {}),
    "verifier, packed by tokens, zero 0": (1, True, {"max_tokens": 60, "zero": 0}),
    "verifier, each prompt anew": (1, False, {}),
    "verifier, zero 3, packed by tokens": (1, True, {"zero": 3, "max_tokens": 60}),
    "verifier, sequence parallel": (1, True, {"sequence_parallel": True}),
}
# More layers, for more stages; and an embedding that both ends of a pipeline have.
DEEP_RUNS = {
    "deep": ("deep", 1, False, {}),
    "deep, micro-batches, recomputed": ("deep", 3, False, {"recompute": "full"}),
    "deep, interleaved": ("deep", 3, False, {"stages_per_rank": 2}),
    "deep, interleaved, lora, recomputed": (
        "deep",
        2,
        True,
        {"stages_per_rank": 2, "recompute": "full", "max_tokens": 40},
    ),
    "deep, lora, packed by tokens": ("deep", 1, True, {"max_tokens": 25}),
    "deep experts, interleaved": ("deep experts", 3, False, {"stages_per_rank": 2}),
    "tied": ("tied", 1, False, {}),
    "tied, micro-batches, zero 0": ("tied", 3, False, {"zero": 0}),
}
# Where ranks divide the tokens, whose heads must divide: 12 of 3 kv heads, and 4 of one.
HEAD_RUNS = {
    "uneven": ("uneven", 1, False, {}),
    "uneven, lora, micro-batches, recomputed": ("uneven", 3, True, {"recompute": "full"}),
    "even experts": ("even experts", 1, False, {}),
    "even experts, micro-batches, recomputed, sequence parallel": (
        "even experts",
        3,
        False,
        {"recompute": "full", "sequence_parallel": True},
    ),
    "even experts, lora, packed by tokens": ("even experts", 1, True, {"max_tokens": 40}),
    "even experts, zero 3": ("even experts", 2, False, {"zero": 3}),
}
# Where ranks are stages of a pipeline; with more than two the models of two layers are left out.
PIPELINED = (
    "full",
    "full, micro-batches, recomputed",
    "full, packed by tokens",
    "full, sequence parallel, micro-batches, recomputed",
    "lora, micro-batches",
    "experts",
    "experts, micro-batches, recomputed",
    "experts, lora, sequence parallel, recomputed",
    "full, state in host memory",
    "lora, state in host memory, micro-batches, recomputed",
    "verifier",
    "verifier, packed by tokens, zero 0",
    "dpo and sft, micro-batches",
    "dpo, packed by tokens",
    "dpo, the reference kept",
    "dpo, lora",
    "dpo, experts",
    "dpo, deep, micro-batches",
    "kto, micro-batches, zero 0",
    "simpo loss",
    "distilled, forward, micro-batches",
    "distilled, js, the teacher in host memory",
    "distilled, top 6",
    "distilled, own answers",
)
# Where ranks divide the tokens; in a pipeline those of the deeper models.
IN_CONTEXT = (
    *HEAD_RUNS,
    "full",
    "full, packed by tokens",
    "full, zero 3, micro-batches, recomputed in part, sequence parallel",
    "full, zero 3, in host memory, recomputed",
    "full, state in host memory",
    "lora, micro-batches",
    "verifier, micro-batches",
    "verifier, each prompt anew",
    "dpo and sft, micro-batches",
    "dpo, in small chunks of logits",
    "dpo, lora",
    "kto, micro-batches, zero 3",
    "distilled, js",
    "distilled, js, the teacher alone on each rank",
    "distilled, top 6",
    "distilled, own answers, zero 3",
)
COMPARISONS, VERIFIER_BATCH = 18, 4
# name: (losses, micro-batches, more settings)
PREFERENCE_RUNS = {
    **{f"{loss} loss": ([loss], 1, {}) for loss in (*PAIR_LOSSES, "kto")},
    "dpo and sft, micro-batches": (["dpo", "sft"], 4, {}),
    "dpo and sft": (["dpo", "sft"], 1, {}),
    "kto, micro-batches, zero 0": (["kto"], 4, {"zero": 0}),
    "kto, micro-batches, zero 3": (["kto"], 4, {"zero": 3}),
    "dpo, lora, zero 2": (["dpo"], 1, {"lora": True, "zero": 2}),
    "dpo, packed by tokens": (["dpo"], 1, {"max_tokens": 60}),
    "dpo, each prompt anew": (["dpo"], 1, {"share_prompts": False}),
    "dpo, in small chunks of logits": (["dpo"], 1, {"logits_at_once": 5 * VOCAB}),
    "dpo, the reference kept": (["dpo"], 1, {"kept": True}),
    "kto, the reference kept": (["kto"], 1, {"kept": True}),
    "dpo, lora": (["dpo"], 1, {"lora": True}),
    "dpo, lora, sequence parallel": (["dpo"], 1, {"lora": True, "sequence_parallel": True}),
    "dpo, experts": (["dpo"], 2, {"model": "experts", "share_prompts": False}),
    "dpo, deep, micro-batches": (["dpo"], 4, {"model": "deep", "reference": "deep reference"}),
}
# name: (β, micro-batches, more settings); the teacher has other sizes, and in some its own degree.
DISTILLATION_RUNS = {
    "distilled, forward": (0.0, 1, {}),
    "distilled, forward, micro-batches": (0.0, 3, {}),
    "distilled, reverse": (1.0, 1, {}),
    "distilled, js": (0.3, 1, {}),
    "distilled, js, the teacher alone on each rank": (0.3, 2, {"degree": 1}),
    "distilled, js, the teacher on half of the ranks": (0.3, 2, {"degree": "half"}),
    "distilled, js, the teacher in host memory": (0.3, 1, {"offload": True}),
    "distilled, js, in small chunks of logits": (0.3, 1, {"logits_at_once": 5 * VOCAB}),
    "distilled, top 6": (0.0, 1, {"k": 6}),
    "distilled, own answers": (0.3, 1, {"on_policy": 0.6}),
    "distilled, own answers, zero 3": (0.3, 2, {"on_policy": 0.6, "zero": 3}),
}
# What four ranks have nothing of their own in: losses, places of the optimizer's state, cuts into
# chunks. They differ from two in how heads and the vocabulary are cut, and in how many share rows.
NOT_AT_FOUR = {
    *(f"{loss} loss" for loss in (*PAIR_LOSSES, "kto") if loss != "dpo"),
    *(f"full, {where}" for where in ("state in host memory", "updated on the CPU")),
    "full, recomputed in part",
    "full, zero 0, updated on the CPU",
    "full, zero 3, packed by tokens",
    "full, zero 3, state in host memory",
    "lora",
    "lora, state in host memory",
    "lora, zero 0, packed by tokens",
    "experts, sequence parallel",
    "muon, zero 0",
    "muon, zero 2",
    "verifier",
    "verifier, each prompt anew",
    "dpo and sft",
    "dpo, each prompt anew",
    "dpo, in small chunks of logits",
    "kto, the reference kept",
    "distilled, forward",
    "distilled, reverse",
    "distilled, js, the teacher in host memory",
    "distilled, js, in small chunks of logits",
    "distilled, top 6",
}
# Adam divides a gradient by its own size: one that is nothing but rounding would move a weight as
# far as any other. Against this one it counts for nothing.
EPSILON = 1e-4
KNOBS = Knobs(0.3, 0.2, 0.4, 1.5, 0.7)


def comparisons() -> list[Comparison]:
    """One to three responses on each side.

    Two in three have a prompt that they share, as the data's have.
    """
    rng, found = random.Random(1), []
    for i in range(COMPARISONS):
        chosen, rejected = rng.randrange(1, 4), rng.randrange(1, 4)
        rows = some_sequences(chosen + rejected, seed=100 + i)
        if i % 3:
            prompt = rows[0].tokens[: rows[0].prompt_length]
            rows = [Sequence([*prompt, *s.tokens[s.prompt_length :]], len(prompt)) for s in rows]
        found.append(Comparison.of_sides(rows[:chosen], rows[chosen:]))
    return found


def solver_run(
    folder: Path, parallel: Parallel, name: str, micro: int, lora: bool, more: dict
) -> dict:
    shared = {name: more[name] for name in ("zero", "offload", "stages_per_rank") if name in more}
    adapter = LORA if lora else None
    model = ours(folder / name, parallel, seed=LORA_SEED, lora=adapter, **shared)
    model.recompute = more.get("recompute", "none")
    model.sequence_parallel = more.get("sequence_parallel", False)
    zero, method = more.get("zero", 1), more.get("method", Method())
    decay_and_norm = WEIGHT_DECAY, MAX_GRAD_NORM
    optimizer = Optimizer(model, parallel, *decay_and_norm, zero=zero, method=method)
    objective = SolverObjective(some_conversations(ROWS), parallel.device, parallel.context)
    return trained(model, optimizer, objective, settings(BATCH, micro, parallel, more), parallel)


def verifier_run(
    folder: Path, parallel: Parallel, micro: int, share_prompts: bool, more: dict
) -> dict:
    model = ours(folder / "score", parallel, zero=more.get("zero", 1))
    model.sequence_parallel = more.get("sequence_parallel", False)
    where = parallel.device, share_prompts, parallel.context
    objective = VerifierObjective(comparisons(), *where)
    optimizer = Optimizer(model, parallel, WEIGHT_DECAY, MAX_GRAD_NORM, zero=more.get("zero", 1))
    return trained(
        model, optimizer, objective, settings(VERIFIER_BATCH, micro, parallel, more), parallel
    )


def preference_objective(
    folder: Path, parallel: Parallel, model: Transformer, losses: list[str], more: dict
) -> PreferenceObjective:
    """With a live reference of other weights, or its numbers, found before."""
    # Two steps, the second of three rows.
    rows, share_prompts = comparisons()[:7], more.get("share_prompts", True)
    off_prompt = mismatched(rows, SEED, 99)
    frozen = ours(folder / more.get("reference", "reference"), parallel)
    lists = [[row.responses for row in rows], [[s] for s in off_prompt]]
    reference = of_mismatched = LiveReference(frozen, share_prompts, parallel)
    if more.get("kept"):
        with RunLog(None, "test", {}, rank=1) as log:
            numbers = [score_all(frozen, x, share_prompts, (4, 50), parallel, log) for x in lists]
        reference, of_mismatched = (KeptReference(x, parallel.device) for x in numbers)
    point = Mismatched(off_prompt, of_mismatched, parallel, 3) if "kto" in losses else None
    weighted = list(zip((1.0, 0.5), losses))
    if set(losses) <= {"orpo", "simpo"}:
        reference = None
    return PreferenceObjective(rows, weighted, KNOBS, reference, parallel, share_prompts, point)


def preference_run(
    folder: Path, parallel: Parallel, losses: list[str], micro: int, more: dict
) -> dict:
    zero, adapter = more.get("zero", 1), LORA if more.get("lora") else None
    start_from = folder / more.get("model", "lm")
    model = ours(start_from, parallel, seed=LORA_SEED, lora=adapter, zero=zero)
    model.sequence_parallel = more.get("sequence_parallel", False)
    optimizer = Optimizer(model, parallel, WEIGHT_DECAY, MAX_GRAD_NORM, zero=zero, eps=EPSILON)
    objective = preference_objective(folder, parallel, model, losses, more)
    before = vocab.LOGITS_AT_ONCE
    vocab.LOGITS_AT_ONCE = more.get("logits_at_once", before)
    plan = settings(VERIFIER_BATCH, micro, parallel, more)
    result = trained(model, optimizer, objective, plan, parallel)
    vocab.LOGITS_AT_ONCE = before
    return result


def distillation_run(folder: Path, parallel: Parallel, beta: float, micro: int, more: dict) -> dict:
    """A student beside a teacher of other sizes: 3 layers, a width and a vocabulary of its own."""
    model = ours(folder / "lm", parallel, zero=more.get("zero", 1))
    opened = Checkpoint.open(str(folder / "teacher"))
    optimizer = Optimizer(model, parallel, WEIGHT_DECAY, MAX_GRAD_NORM, eps=EPSILON)
    sequences, distance = some_sequences(ROWS), Distance(beta)
    degree = more.get("degree")
    degree = max(1, parallel.mp_size // 2) if degree == "half" else degree
    flags = {
        "ckpt_dir": "-",
        "save_dir": "-",
        "train_file": "-",
        "teacher_ckpt_dir": "-",
        "teacher_model_parallel_size": degree,
        "offload_teacher": more.get("offload", False),
    }
    given = {name: value for name, value in flags.items() if value is not None}
    flags_given = build(DistillTrainSettings, given)
    live = load_teacher(flags_given, opened, model.config, distance, torch.float32, parallel)
    held = live
    if k := more.get("k"):
        whole = plain(ours(folder / "teacher", parallel), parallel)
        with RunLog(None, "test", {}, rank=1) as log, torch.no_grad(), whole as (teacher, division):
            scored = score_responses(teacher, division, sequences, 1.0, 4, log, k)
        tops = (
            [torch.tensor(x.top_tokens) for x in scored],
            [torch.tensor(x.top_logprobs) for x in scored],
        )
        held = KeptTeacher(*tops, distance, parallel.device)
    sample, share = None, more.get("on_policy", 0.0)
    if share:
        sampling = Sampling(max_new_tokens=6, temperature=1.0, seed=SEED)
        sample = sampling_from(model, parallel, sampling, {EOS}, (4, 32, None))

    objective = DistillationObjective(sequences, held, parallel, sample, share, BATCH, SEED)
    before = vocab.LOGITS_AT_ONCE
    vocab.LOGITS_AT_ONCE = more.get("logits_at_once", before)
    result = trained(model, optimizer, objective, settings(BATCH, micro, parallel, more), parallel)
    vocab.LOGITS_AT_ONCE = before
    return result


def settings(batch: int, micro: int, parallel: Parallel, more: dict) -> TrainSettings:
    """The same rows per step whatever the division."""
    share = batch // parallel.data_size
    per_micro = max(1, share // micro)
    return training(
        lr=LR,
        max_batch_size=per_micro,
        accumulation_steps=share // per_micro,
        warmup=WARMUP,
        seed=SEED,
        max_tokens_per_batch=more.get("max_tokens"),
    )


def trained(model, optimizer, objective, plan: TrainSettings, parallel: Parallel) -> dict:
    """Losses, norms and weights after the first and the last step.

    And whether replicated weights stayed the same bits.
    """
    evaluated, first, step = [], [], optimizer.step

    def step_and_look(lr: float) -> dict:
        result = step(lr)
        if not first:
            first.append(whole_weights(model, parallel))
        return result

    optimizer.step = step_and_look
    with RunLog(None, "test", {}, rank=1) as log:
        history = fit(
            model,
            optimizer,
            objective,
            plan,
            parallel,
            log,
            lambda at, number: evaluated.append(number),
        )
    # What all of a model's ranks hold; and a tied embedding, which both ends of a pipeline hold.
    embedding = "tok_embeddings.weight"
    replicated = {
        n if n != embedding else f"{n} of {parallel.mp_rank}": whole(p.detach())
        for n, p in model.named_parameters()
        if n == embedding or p.copies == parallel.mp_size
    }
    every = [None] * parallel.world_size
    dist.all_gather_object(every, replicated)
    pairs = [(other[n], replicated[n]) for other in every for n in replicated if n in other]
    alike = all(torch.equal(a, b) for a, b in pairs)
    weights = whole_weights(model, parallel)
    return {
        "history": history,
        "evaluated": evaluated,
        "first": first[0],
        "weights": weights,
        "alike": alike,
    }


# gradient → the parameter that goes bad and what its gradient becomes
POISONS = (None, ("layers.0.attention.wq.weight", torch.nan), ("norm.weight", torch.inf), None)


def poisoned(folder: Path, parallel: Parallel) -> dict:
    """A good step, two with a gradient not finite on the last rank alone, and a good one again."""
    model = ours(folder / "lm", parallel)
    optimizer = Optimizer(model, parallel)
    objective = SolverObjective(some_sequences(4), parallel.device)
    results, weights = [], []
    for poison in POISONS:
        hook = None
        if poison and parallel.rank == parallel.world_size - 1:
            name, value = poison
            hook = model.get_parameter(name).register_hook(
                lambda grad, value=value: torch.full_like(grad, value)
            )
        local_rows = [i for i in range(4) if i % parallel.dp_size == parallel.dp_rank]
        optimizer.backward(objective.loss(model, local_rows, sum(objective.weights))[0])
        if hook is not None:
            hook.remove()
        results.append(optimizer.step(1e-3))
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(weights, weights[1:])]
    report = [None] * parallel.world_size
    dist.all_gather_object(
        report, ([r["skipped"] for r in results], [r["grad_norm"] for r in results], same)
    )
    return {"ranks": report, "weights": whole_weights(model, parallel)}


def sharded_state(folder: Path, parallel: Parallel) -> dict:
    """The same steps in bf16 with the optimizer's state shared and whole.

    Weights, and how much state each rank holds.
    """
    found = {}
    for zero in (0, 1):
        model = ours(folder / "lm", parallel, torch.bfloat16)
        optimizer = Optimizer(model, parallel, WEIGHT_DECAY, MAX_GRAD_NORM, zero=zero)
        objective = SolverObjective(some_sequences(ROWS), parallel.device)
        with RunLog(None, "test", {}, rank=1) as log:
            fit(
                model,
                optimizer,
                objective,
                settings(BATCH, 2, parallel, {}),
                parallel,
                log,
                lambda at, number: None,
            )
        held = sum(state["exp_avg"].numel() for state in optimizer.local.state.values())
        masters = sum(master.numel() for _, master in optimizer.local.rounded)
        every = [None] * parallel.world_size
        dist.all_gather_object(every, (held, masters))
        found[zero] = {"held": every, "weights": whole_weights(model, parallel)}
    numbers = sum(p.numel() for p in model.parameters())
    return {**found, "numbers": numbers, "shared": shared_bytes(folder, parallel)}


def shared_bytes(folder: Path, parallel: Parallel) -> dict:
    """(found on rank 0, planned) of a model whose weights are shared.

    Of weights and optimizer after a step; and of what is put together in it, where a block is large
    beside a token's activations.
    """
    found = {}
    kinds = (3, torch.float32), (3, torch.bfloat16), (2, torch.float32)
    for (zero, dtype), lora in itertools.product(kinds, (None, LORA)):
        model = ours(folder / "wide", parallel, dtype, lora=lora, zero=zero)
        optimizer = Optimizer(model, parallel, zero=zero)
        optimizer.idle_backward(last=True)
        optimizer.step(1e-3)
        kept = (
            sum(own(p).nbytes for p in model.parameters()),
            sum(x.nbytes for x in optimizer.state_tensors()),
        )
        most = most_allocated(partial(optimizer.idle_backward, last=True))
        division = parallel.mp_size, parallel.dp_size
        plan = training_budget(model.config, *division, dtype, lora, zero=zero)
        found[zero, dtype, lora is not None] = {
            "kept": (kept, (plan.weights, plan.optimizer)),
            "put together": (most - plan.gradients, gathered_bytes(model)),
        }
    return found


def measure(folder: Path, parallel: Parallel) -> dict:
    with RunLog(None, "test", {}, rank=1) as log:
        summary, rows = evaluate_pairs(
            ours(folder / "score", parallel), parallel, comparisons(), 3, log
        )
    every = [None] * parallel.world_size
    dist.all_gather_object(every, (summary, rows))
    return {
        "summary": summary,
        "rows": rows,
        "alike": all(other == (summary, rows) for other in every),
    }


KINDS_OF_RUNS = (
    (solver_run, SOLVER_RUNS),
    (solver_run, METHOD_RUNS),
    (solver_run, DEEP_RUNS),
    (solver_run, HEAD_RUNS),
    (verifier_run, VERIFIER_RUNS),
    (preference_run, PREFERENCE_RUNS),
    (distillation_run, DISTILLATION_RUNS),
)


def all_checks(folder: Path, mp_sizes: list[int]) -> None:
    for mp_size in mp_sizes:
        parallel = start(mp_size, timeout=120)
        results = {}
        for of, runs in KINDS_OF_RUNS:
            names = [name for name in runs if runs_at(name, parallel.world_size)]
            results |= {name: of(folder, parallel, *runs[name]) for name in names}
        results["poisoned"] = poisoned(folder, parallel)
        results["pairs"] = measure(folder, parallel)
        results["state"] = sharded_state(folder, parallel)
        if parallel.is_main:
            torch.save(results, folder / f"{parallel.world_size}-{mp_size}.pt")
    stop()


def runs_at(name: str, ranks: int) -> bool:
    """Whether a run is one of so many ranks, of which each has whole layers and rows."""
    if name in HEAD_RUNS or name in DEEP_RUNS or "deep" in name:
        return ranks == 1
    return ranks < 4 or name not in NOT_AT_FOUR


def runs_divided(name: str, stages: int, context: int = 1) -> bool:
    """Whether a run is one of so many stages, and of so many ranks that divide the tokens.

    Five layers make five stages at most.
    """
    if context > 1:
        return name in IN_CONTEXT if stages == 1 else name.startswith("deep, ")
    if stages > 2:
        return "deep" in name and "interleaved" not in name and "experts" not in name
    return name in DEEP_RUNS or name in PIPELINED


def divided_checks(folder: Path, divisions: list[str]) -> None:
    """divisions: ranks that share tensors, stages, and maybe ranks that divide tokens, of each."""
    for division in divisions:
        mp_size, *others = map(int, division.split(":"))
        parallel = start(mp_size, 120, False, *others)
        results = {}
        for of, runs in KINDS_OF_RUNS:
            names = [name for name in runs if runs_divided(name, *others)]
            results |= {name: of(folder, parallel, *runs[name]) for name in names}
        if parallel.is_main:
            place = f"{parallel.world_size}-{division.replace(':', '-')}.pt"
            torch.save(results, folder / place)
    stop()


if __name__ == "__main__":
    asked = sys.argv[2:]
    if ":" in asked[0]:
        divided_checks(Path(sys.argv[1]), asked)
    else:
        all_checks(Path(sys.argv[1]), [int(size) for size in asked])
