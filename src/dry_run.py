"""The dry run of a training script: everything is read and checked, and nothing trained or written.

It prints the bytes of each rank, the rows, an example with its loss mask, and the steps. Without a
checkpoint at hand, --model_type alone is enough for the bytes. That of a script that generates
prints the bytes alone.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from src.checkpoint.source import Checkpoint, config_of_type
from src.data.encoding import Graded
from src.data.sources import parts_of
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.generation.cache import Cache, pages_for
from src.inputs import OpenedModel, adapter_config, check_trainable
from src.models.batch import Sequence
from src.models.config import ModelConfig
from src.models.context import check_heads
from src.models.lora import LoRAConfig
from src.models.stages import cut_in_stages
from src.models.transformer import build
from src.parallel.layout import Layout
from src.parallel.setup import Parallel, agreed, pick_dtype, start, stop
from src.ppo.fit import iterations_of
from src.ppo.inputs import PPOInputs
from src.ppo.layouts import Layouts
from src.ppo.setup import together_on_device
from src.settings.distillation import DistillTrainSettings
from src.settings.model import TextModelSettings
from src.settings.ppo import PPOTrainSettings
from src.settings.preference import PreferenceTrainSettings
from src.settings.pretraining import PretrainSettings, StepSettings
from src.settings.run import TrainingRunSettings
from src.settings.scripts import (
    SolverEvaluateSettings,
    SolverGenerateSettings,
    SolverTrainSettings,
    TrainSettings,
    VerifierTrainSettings,
)
from src.storage import name_of
from src.trainer.activations import activations, described, device_memory, tokens_at_once
from src.trainer.averages import Method
from src.trainer.batches import StreamSteps
from src.trainer.budget import (
    Budget,
    adapter_bytes,
    model_budget,
    streamed_bytes,
    training_budget,
)
from src.trainer.fit import rows_per_step
from src.trainer.inputs import (
    DistillationInputs,
    PreferenceInputs,
    PretrainInputs,
    SolverInputs,
    VerifierInputs,
)
from src.trainer.preference import Row

TrainInputs = TypeVar(
    "TrainInputs",
    PretrainInputs,
    SolverInputs,
    VerifierInputs,
    PreferenceInputs,
    DistillationInputs,
)
Generating = SolverGenerateSettings | SolverEvaluateSettings
Planned = TrainSettings | PPOTrainSettings | Generating
NOT_READ = "rows, steps and an example: give a checkpoint and the train file"


def planned_ranks(settings: Planned, parallel: Parallel) -> int:
    """How many ranks are planned for, which need not be those that run."""
    return settings.dry_run.world_size or parallel.world_size


def planned_layout(settings: TrainSettings | Generating, parallel: Parallel) -> Layout:
    """Raises UserError when the degrees do not divide the ranks that are planned for."""
    world_size, run = planned_ranks(settings, parallel), settings.run
    pp = vp = cp = 1
    sp, zero = False, 0
    if isinstance(run, TrainingRunSettings):
        pp, vp = run.pipeline_parallel_size, run.stages_per_rank
        cp, sp, zero = run.context_parallel_size, run.sequence_parallel, run.zero
    tp = run.model_parallel_size or max(1, world_size // (pp * cp))
    if world_size % (tp * pp * cp):
        stages = f" x --pipeline_parallel_size {pp}" if pp > 1 else ""
        context = f" x --context_parallel_size {cp}" if cp > 1 else ""
        raise UserError(
            f"--model_parallel_size {tp}{stages}{context} does not divide the {world_size} ranks "
            "that are planned for (--world_size)"
        )
    return Layout(world_size // (tp * pp * cp), pp, tp, sp, cp, zero, vp)


def solver_plan(settings: SolverTrainSettings) -> None:
    """Print what solver_train.py would do."""

    def example(inputs: SolverInputs) -> list[str]:
        return _sequence_lines(inputs.model.tokenizer, inputs.sequences[0])

    _plan(settings, "lm", partial(SolverInputs.read, settings), example)


def pretraining_plan(settings: PretrainSettings) -> None:
    """Print what pretrain.py would do."""

    def example(inputs: PretrainInputs) -> list[str]:
        stream, tokenizer = inputs.stream, inputs.model.tokenizer
        lines = [
            f"  {part.shards.folder}: {part.shards.tokens:,} tokens in {part.shards.documents:,} "
            f"documents, {rows:,} rows, {float(part.weight / total):.4g} of the rows"
            for total in [sum(part.weight for part in stream.parts)]
            for part, rows in zip(stream.parts, stream.rows_of)
        ]
        spans = stream.spans(0)
        lines += [f"example, row 0: {len(spans)} sequences, no loss on the first token of each"]
        tokens = [stream.batch([span], torch.device("cpu")).tokens.tolist() for span in spans]
        return lines + [f"  {len(ids):5} tokens  {tokenizer.spelled(ids)!r}" for ids in tokens]

    _plan(settings, "lm", partial(PretrainInputs.read, settings), example, begins=True)


def verifier_plan(settings: VerifierTrainSettings) -> None:
    """Print what verifier_train.py would do."""

    def example(inputs: VerifierInputs) -> list[str]:
        tokenizer, pair = inputs.model.tokenizer, inputs.rows[0]
        if isinstance(pair, Graded):
            tokens = list(pair.sequence.tokens)
            said = ", ".join(f"{grade:g}" for grade in pair.grades)
            lines = [f"example, row 0: {len(tokens)} tokens, graded {said} at {pair.places}"]
            return [*lines, f"  {tokenizer.spelled(tokens)!r}"]
        lines = ["example, row 0: the scalar head reads the last token of each side"]
        sides = zip(("chosen", "rejected"), pair.pairs[0])
        for side, sequence in ((side, pair.responses[place]) for side, place in sides):
            text = tokenizer.spelled(list(sequence.tokens))
            lines += [f"  {side:9}{len(sequence.tokens):5} tokens  {text!r}"]
        return lines

    _plan(settings, "score", partial(VerifierInputs.read, settings), example)


def preference_plan(settings: PreferenceTrainSettings) -> None:
    """Print what preference_train.py would do."""
    preference = settings.preference

    def example(inputs: PreferenceInputs) -> list[str]:
        tokenizer = inputs.model.tokenizer
        if inputs.prompts:
            prompt = inputs.prompts[0]
            return [
                f"example, prompt 0: {len(prompt.tokens)} tokens",
                f"  no loss  {tokenizer.spelled(prompt.tokens)!r}",
                f"  loss     on the best and the worst of {settings.online.samples_per_prompt}",
            ]
        row = inputs.rows[0]
        lines = [f"example, row 0: {len(row.responses)} outputs of one prompt, with loss on each"]
        lines += _sequence_lines(tokenizer, row.responses[0])[1:2]
        good = Row.of(row).labels
        for sequence, is_good in zip(row.responses, good):
            tokens = list(sequence.tokens)[sequence.prompt_length :]
            side = "chosen" if is_good else "rejected"
            lines += [f"  {side:9}{tokenizer.spelled(tokens)!r}"]
        return lines

    def beside(config: ModelConfig, layout: Layout, dtype: torch.dtype) -> dict[str, Budget]:
        is_live = preference.has_reference and preference.cache_reference is None
        shares = settings.lora.is_on
        frozen = model_budget(config, layout.tp, dtype, settings.lora.quantize, layout.pp)
        budgets = {"reference": Budget(0) if shares else frozen} if is_live else {}
        folder = settings.judge.reward_model_ckpt_dir
        if folder is not None:
            verifier = Checkpoint.open(folder, None, None, alone=True).config
            budgets["reward"] = model_budget(verifier, layout.tp, dtype, None, layout.pp)
        return budgets

    _plan(settings, "lm", partial(PreferenceInputs.read, settings), example, beside)


def distillation_plan(settings: DistillTrainSettings) -> None:
    """Print what distill_train.py would do."""
    of_teacher = settings.teacher

    def example(inputs: DistillationInputs) -> list[str]:
        tokenizer, sequence = inputs.model.tokenizer, inputs.sequences[0]
        if sequence.response_length:
            return _sequence_lines(tokenizer, sequence)
        tokens = list(sequence.tokens)
        lines = [f"example, prompt 0: {len(tokens)} tokens"]
        lines += [f"  no loss  {tokenizer.spelled(tokens)!r}"]
        return [*lines, "  loss     on every token of the student's response"]

    def beside(config: ModelConfig, layout: Layout, dtype: torch.dtype) -> dict[str, Budget]:
        if of_teacher.teacher_ckpt_dir is None:
            return {}
        teacher = Checkpoint.open(of_teacher.teacher_ckpt_dir, None, None, alone=True).config
        n = of_teacher.teacher_model_parallel_size or layout.tp
        if n == layout.tp:
            check_heads(teacher, n, layout.cp, "teacher")
        quantize = of_teacher.teacher_quantize
        return {"teacher": model_budget(teacher, n, dtype, quantize, layout.pp)}

    has_all = of_teacher.is_live or not of_teacher.on_policy
    _plan(settings, "lm", partial(DistillationInputs.read, settings), example, beside, has_all)


def _plan(
    settings: TrainSettings,
    head: str,
    read: Callable[[Parallel], TrainInputs],
    example: Callable[[TrainInputs], list[str]],
    beside: Callable[[ModelConfig, Layout, torch.dtype], dict[str, Budget]] | None = None,
    has_all: bool = True,
    begins: bool = False,
) -> None:
    """Print a trainer's plan.

    head: of the trained model; example: lines about the first row; beside: what else lies on the
    device; has_all: whether what is read beside the model and the train file is at hand; begins:
    whether a config and a tokenizer are a model, of random weights.
    """
    parallel = start(None, settings.run.timeout, settings.run.deterministic)
    layout, dtype = (
        planned_layout(settings, parallel),
        pick_dtype(settings.run.dtype, parallel.device),
    )
    inputs = None
    start_from = settings.model
    is_there = bool(start_from.ckpt_dir) or (
        begins and bool(start_from.config_file and start_from.tokenizer_file)
    )
    if is_there and settings.data.train_file and has_all:
        inputs = agreed(lambda: read(parallel))
    opened = inputs.model if inputs is not None else None
    config = _config(settings.model, settings.model.ckpt_dir, opened).with_head(head)
    check_heads(config, layout.tp, layout.cp)
    lora = inputs.lora if inputs is not None else _new_adapter(settings, config)
    budgets = {"model": _trained(settings, config, layout, dtype, lora)}
    budgets |= beside(config, layout, dtype) if beside is not None else {}
    lines = _bytes_lines(config, layout, dtype, budgets)
    held = sum(budget.total for budget in budgets.values())
    lines += _limit_lines(settings, [config], layout, dtype, held, parallel)
    if inputs is None:
        lines += [NOT_READ + " (or --config_file and --tokenizer_file)" * begins]
    else:
        lines += _step_lines(settings, inputs.mixture.n_rows, inputs.notes, layout)
        lines += example(inputs)
    _print(lines, parallel)


def ppo_plan(settings: PPOTrainSettings) -> None:
    """Print what ppo_train.py would do."""
    roles, run = settings.roles, settings.run
    parallel = start(None, run.timeout, run.deterministic)
    ranks, size = planned_ranks(settings, parallel), settings.rollouts.max_buffer_size
    layouts = Layouts.of(settings.layouts, run, size, ranks)
    layout, dtype = layouts.actor_train, pick_dtype(run.dtype, parallel.device)
    inputs = None
    if roles.actor_ckpt_dir and settings.prompts.train_file:
        inputs = agreed(lambda: PPOInputs.read(settings, parallel, dtype))

    # Other roles whose checkpoints are not at hand are taken to be like the actor.
    opened = inputs.roles.actor if inputs is not None else None
    actor = _config(roles, roles.actor_ckpt_dir, opened).with_head("lm")
    budgets = _role_budgets(settings, actor, inputs, layouts, dtype)
    lines = _bytes_lines(actor, layout, dtype, budgets, layouts.described)
    trained = [name for name, budget in budgets.items() if budget.gradients]
    held = max(
        sum(budgets[name].total for name in names)
        for names in together_on_device(list(budgets), trained, settings)
    )
    lines += _limit_lines(settings, [actor], layout, dtype, held, parallel)
    if roles.offload:
        lines += ["  --offload: not all of these are on the device at once"]
    if inputs is None:
        lines += [NOT_READ]
    else:
        rollouts, updates = settings.rollouts, settings.updates
        per_iteration = rollouts.max_buffer_size // rollouts.samples_per_prompt
        prompts = inputs.prompts
        _, iterations = iterations_of(inputs.mixture.n_rows, per_iteration, settings.optimizer)
        lines += [f"prompts: {inputs.mixture.n_rows:,}"]
        lines += [f"  {note}" for note in inputs.notes]
        lines += [
            f"iterations: {iterations:,} of {rollouts.max_buffer_size} rollouts; each up to "
            f"{updates.ppo_epochs} x {updates.mini_batches} optimizer steps"
        ]
        prompt, tokenizer = prompts[0], inputs.roles.actor.tokenizer
        lines += [f"example, prompt 0: {len(prompt.tokens)} tokens"]
        lines += [f"  no loss  {tokenizer.spelled(prompt.tokens)!r}"]
        lines += ["  loss     on every token of the response"]
        lines += [f"  gold     {prompt.gold!r}"] if prompt.gold else []
    _print(lines, parallel)


def generation_plan(settings: Generating) -> None:
    """Print what a script that generates would hold in memory."""
    model, weights, run = settings.model, settings.weights, settings.run
    parallel = start(None, run.timeout, run.deterministic)
    layout, dtype = planned_layout(settings, parallel), pick_dtype(run.dtype, parallel.device)
    config, lora = _config(model, model.ckpt_dir, None).with_head("lm"), None
    if model.ckpt_dir and weights.quantize:  # else an adapter is part of the weights
        adapter = Checkpoint.open(model.ckpt_dir, model.config_file, model.adapter_dir).adapter
        lora = None if adapter is None else adapter.lora
    how = config, layout.tp, dtype, weights.quantize
    device = model_budget(*how).weights + adapter_bytes(config, layout.tp, dtype, lora)
    bytes_line = f"bytes per rank: {device:,} on the device, all weights"
    if weights.offload_params:
        device, host = streamed_bytes(*how, lora)
        bytes_line = (
            f"bytes per rank: {device:,} on the device, two layers and both ends; {host:,} in host "
            f"memory, all {config.n_layers} layers"
        )
    page = Cache.page_bytes(build(config, 0, layout.tp, dtype))
    longest = settings.batches.max_seq_len
    lines = [
        "dry run: nothing is generated or written",
        *_model_lines(config, dtype, layout.described),
        bytes_line,
        f"  keys and values of {longest:,} tokens (--max_seq_len): {pages_for(longest) * page:,}",
        "  activations and the libraries come on top",
    ]
    _print(lines, parallel)


def _config(
    model: TextModelSettings, ckpt_dir: str | None, opened: OpenedModel | None
) -> ModelConfig:
    """The model's sizes: the checkpoint's, a config file's, or those of a --model_type."""
    if opened is not None:
        return opened.checkpoint.config
    if ckpt_dir:
        return Checkpoint.open(ckpt_dir, model.config_file, None, alone=True).config
    return config_of_type(model.model_type, model.config_file)


def _new_adapter(
    settings: TrainSettings | PPOTrainSettings, config: ModelConfig
) -> LoRAConfig | None:
    return adapter_config(settings.lora, config) if settings.lora.is_on else None


def _trained(
    settings: TrainSettings | PPOTrainSettings,
    config: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    lora: LoRAConfig | None,
) -> Budget:
    check_trainable(settings.optimizer, settings.lora, config, "the model")
    return training_budget(
        config,
        layout.tp,
        layout.models,
        dtype,
        lora,
        settings.lora.quantize,
        settings.optimizer.freeze_layers,
        layout.zero,
        cut_in_stages(config, layout.pp, layout.vp),
        Method.of(settings.optimizer, settings.run),
    )


def _role_budgets(
    settings: PPOTrainSettings,
    actor: ModelConfig,
    inputs: PPOInputs | None,
    layouts: Layouts,
    dtype: torch.dtype,
) -> dict[str, Budget]:
    """What each role of PPO takes, and a second copy of the policy where rollouts need one."""
    opened = inputs.roles if inputs is not None else None
    critic = verifier = actor.with_head("score")
    if opened is not None and opened.critic:
        critic = opened.critic.checkpoint.config.with_head("score")
    if opened is not None and opened.verifier:
        verifier = opened.verifier.checkpoint.config.with_head("score")
    roles, quantize = settings.roles, settings.lora.quantize
    train, trunk = layouts.actor_train, roles.shared_trunk
    shares = train.zero >= 2 and train.models > 1  # the weights of what is trained

    def frozen(config: ModelConfig, layout: Layout, dtype: torch.dtype, quantize=None) -> Budget:
        return model_budget(config, layout.tp, dtype, quantize, layout.pp)

    lora = opened.lora if opened is not None else _new_adapter(settings, actor)
    budgets = {"policy": _trained(settings, actor, train, dtype, lora)}
    has_reference = settings.penalty.kl_coef != 0
    if inputs is not None:
        has_reference = inputs.has_reference(settings)
    if has_reference:
        # With an adapter the reference is the policy without it, unless ranks share its weights;
        # one that moves is exact in fp32.
        moves = settings.penalty.ref_ema is not None
        own = frozen(actor, layouts.ref_inf, dtype, quantize).weights
        if moves and dtype != torch.float32:
            own += frozen(actor, layouts.ref_inf, torch.float32).weights
        is_there = layouts.ref_inf.is_like(train) and not shares
        is_policy = settings.lora.is_on and not moves and is_there
        budgets["reference"] = Budget(0 if is_policy else own)
    if settings.advantages.has_value:
        lora = opened.critic_lora if opened is not None else _new_adapter(settings, critic)
        adapter = opened.adapters.get("value") if opened is not None else None
        lora = adapter.lora if adapter is not None else lora
        value = _trained(settings, critic, layouts.critic_train, dtype, lora)
        shared = frozen(critic, layouts.critic_train, dtype, quantize).weights
        shared -= critic.dim * dtype.itemsize
        weights = value.weights - (shared if trunk else 0)
        budgets["value"] = replace(value, weights=weights)
    if "verifier" in settings.rewards.names:
        reward, n = frozen(verifier, layouts.rew_inf, dtype, quantize), layouts.rew_inf.tp
        if trunk:
            adapter = opened.adapters.get("reward") if opened is not None else None
            lora = adapter.lora if adapter is not None else _new_adapter(settings, verifier)
            reward = Budget(adapter_bytes(verifier, n, dtype, lora) + verifier.dim * dtype.itemsize)
        budgets["reward"] = reward
    generates = layouts.actor_gen
    if not generates.is_like(train) or shares or train.pp > 1:
        budgets["policy again, in rollouts"] = model_budget(actor, generates.tp, dtype)
    if settings.advantages.has_value and not layouts.critic_inf.is_like(layouts.critic_train):
        budgets["value again, for values"] = frozen(critic, layouts.critic_inf, dtype)
    return budgets


def _bytes_lines(
    config: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    budgets: dict[str, Budget],
    described: str | None = None,
) -> list[str]:
    """A table of what the fullest rank holds. described: how ranks are divided, if in layouts."""
    rows: list[tuple[str, ...]] = [("bytes per rank", "weights", "gradients", "optimizer", "all")]
    rows += [
        (f"  {name}", *(f"{x:,}" for x in (b.weights, b.gradients, b.optimizer, b.total)))
        for name, b in budgets.items()
    ]
    if any(b.host for b in budgets.values()):  # of the optimizer
        in_host = ("in host memory", *(f"{b.host:,}" for b in budgets.values()))
        rows = [(*row, host) for row, host in zip(rows, in_host)]
    if len(budgets) > 1:
        total = sum(b.total for b in budgets.values())
        rows += [("  all roles", "", "", "", f"{total:,}", *[""] * (len(rows[0]) - 5))]
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return [
        "dry run: nothing is trained or written",
        *_model_lines(config, dtype, described or layout.described),
        *table,
        "  activations, batches, keys and values, and the libraries come on top",
    ]


def _model_lines(config: ModelConfig, dtype: torch.dtype, described: str) -> list[str]:
    number_type = str(dtype).removeprefix("torch.")
    return [
        f"model: {config.family}, {config.n_layers} layers of width {config.dim}; {number_type}",
        described,
    ]


def _limit_lines(
    settings: TrainSettings | PPOTrainSettings,
    configs: list[ModelConfig],
    layout: Layout,
    dtype: torch.dtype,
    held: int,
    parallel: Parallel,
) -> list[str]:
    """How many tokens are computed at a time, if that is limited. configs: of what is trained."""
    batches, memory = settings.batches, device_memory(parallel.device)
    tokens = batches.max_tokens_per_batch
    if tokens is None and memory is not None:
        run, lora = settings.run, settings.lora.is_on
        how = run.checkpoint_activations, lora, layout.sp, layout.cp
        of_each = [activations(c, layout.tp, dtype, *how) for c in configs]
        tokens = tokens_at_once(of_each, memory, held, batches.max_seq_len)
    return described(tokens)


def _step_lines(
    settings: TrainSettings, n_rows: int, notes: list[str], layout: Layout
) -> list[str]:
    size, plan = rows_per_step(settings.batches, layout.dp), settings.optimizer
    per_epoch = -(-n_rows // size)
    steps = f"{plan.epochs} x {per_epoch:,} = {plan.epochs * per_epoch:,}"
    if isinstance(plan, StepSettings):
        steps = f"{StreamSteps(n_rows, size, plan.epochs, plan.max_steps).total:,}"
    names = [name_of(part.location.rstrip("/")) for part in parts_of(settings.data.train_file)]
    return [
        f"rows: {n_rows:,} of {', '.join(names)}",
        *(f"  {note}" for note in notes),
        f"steps: {steps}, of {size:,} rows",
    ]


def _sequence_lines(tokenizer: Tokenizer, sequence: Sequence) -> list[str]:
    """An example, what is read and what is learned."""
    tokens, end = list(sequence.tokens), 0
    lines = [f"example, row 0: {len(tokens)} tokens, {sequence.response_length} of them with loss"]
    for first, last in (*sequence.ranges, (len(tokens), len(tokens))):
        for what, part in (("no loss", tokens[end:first]), ("loss", tokens[first:last])):
            lines += [f"  {what:9}{tokenizer.spelled(part)!r}"] if part else []
        end = last
    return lines


def _print(lines: list[str], parallel: Parallel) -> None:
    if parallel.is_main:
        print("\n".join(lines))
    stop()
