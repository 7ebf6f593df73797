"""What the scripts read before any work, checked on every rank and refused with one voice."""

import os
from array import array
from dataclasses import dataclass, replace
from pathlib import Path

from src.checkpoint.manifest import check_whole
from src.checkpoint.source import Checkpoint, check_model_type
from src.data.rows import (
    LABEL,
    TEXT,
    TEXTS,
    read_prompt_rows,
    read_rows,
    read_solver_rows,
    read_verifier_rows,
)
from src.data.tokenizer import Tokenizer, check_vocabulary
from src.errors import UserError
from src.evaluation.tasks import Task, find_task
from src.models.batch import Sequence
from src.models.lora import LoRAConfig, default_targets
from src.parallel.setup import Parallel
from src.ppo.buffer import Prompt
from src.trainer.verifier import Comparison

# Flag → the smallest and the largest value that make sense, and whether the smallest itself does.
RANGES = {
    **dict.fromkeys(
        ("max_batch_size", "eval_batch_size", "rollout_batch_size", "accumulation_steps"),
        (1, 10**7, True),
    ),
    **dict.fromkeys(
        (
            "max_tokens_per_batch",
            "eval_every",
            "save_every",
            "keep",
            "max_skipped_steps",
            "overlong_margin",
            "ptx_batch_size",
        ),
        (1, 10**9, True),
    ),
    **dict.fromkeys(("critic_warmup", "filter_rounds", "log_samples"), (0, 10**6, True)),
    **dict.fromkeys(("critic_model_parallel_size", "reward_model_parallel_size"), (1, 10**7, True)),
    **dict.fromkeys(
        ("cliprange_high", "target_kl", "reward_clip", "reward_scale"), (0, 1e9, False)
    ),
    **dict.fromkeys(("entropy_coef", "ptx_coef"), (0, 1e6, True)),
    "reward_bias": (-1e9, 1e9, True),
    "dual_clip": (1, 1e9, False),
    "lam_critic": (0, 1, True),
    "ref_ema": (0, 0.9999999, True),
    **dict.fromkeys(
        ("max_new_tokens", "max_buffer_size", "samples_per_prompt", "num_samples", "max_rows"),
        (1, 10**7, True),
    ),
    **dict.fromkeys(
        (
            "epochs",
            "iterations",
            "mini_batches",
            "ppo_epochs",
            "model_parallel_size",
            "rollout_model_parallel_size",
        ),
        (1, 10**7, True),
    ),
    **dict.fromkeys(
        ("lr", "critic_lr", "max_grad_norm", "lora_alpha", "kl_target", "kl_horizon"),
        (0, 1e9, False),
    ),
    **dict.fromkeys(("weight_decay", "kl_coef", "vf_coef", "truncation_penalty"), (0, 1e6, True)),
    "temperature": (0, 100, True),
    **dict.fromkeys(("beta2", "warmup"), (0, 0.999999, True)),
    **dict.fromkeys(("cliprange", "cliprange_value"), (0, 1e6, False)),
    **dict.fromkeys(("gamma", "lam"), (0, 1, True)),
    "lora_dropout": (0, 0.999, True),
    "kv_cache_gb": (0, 1e6, False),
    "length_penalty": (-100, 100, True),
    **dict.fromkeys(("min_p", "top_p"), (0, 1, True)),
    "repetition_penalty": (0, 1000, False),
    "min_new_tokens": (0, 10**7, True),
    "num_beams": (1, 1000, True),
    "freeze_layers": (0, 10**4, True),
    "router_aux_loss_coef": (0, 1e3, True),
    "max_seq_len": (2, 10**7, True),
    "lora_rank": (1, 10**5, True),
    "timeout": (0, 10**7, False),
    "seed": (0, 2**63 - 1, True),
}


def check_flags(settings: dict) -> None:
    """Raise UserError, naming all of them, when numeric flags are out of range. `settings`: a script's flags."""
    wrong = []
    for name, value in settings.items():
        if name not in RANGES or value is None or (name == "lora_rank" and value == -1):
            continue
        low, high, closed = RANGES[name]
        if name == "temperature" and 0 < value < 1e-3:
            wrong.append(f"--temperature {value}: must be 0 or at least 0.001")
        if not (low <= value <= high and (closed or value > low)):
            bound = f"at least {low}" if closed else f"above {low}"
            also = " (or -1, to train all weights)" if name == "lora_rank" else ""
            wrong.append(f"--{name} {value}: must be {bound} and at most {high:g}{also}")
    if wrong:
        raise UserError("\n  ".join(wrong))


def check_beams(settings: dict) -> None:
    """Raise UserError when flags of sampling stand beside beam search, which samples nothing."""
    if settings["num_beams"] == 1:
        if settings["length_penalty"] != 1:
            raise UserError("--length_penalty: has no effect without --num_beams")
        return
    plain = {
        "temperature": 0,
        "top_p": 1,
        "top_k": 0,
        "min_p": 0,
        "repetition_penalty": 1,
        "min_new_tokens": 0,
        "num_samples": 1,
    }
    idle = [
        f"--{name} {settings[name]}" for name, value in plain.items() if settings[name] != value
    ]
    idle += ["--stop_strings"] * bool(settings.get("stop_strings"))
    if idle:
        raise UserError(
            f"--num_beams {settings['num_beams']}: beam search has no {', '.join(idle)}"
        )


@dataclass(frozen=True)
class Model:
    """A checkpoint whose files were looked through, and its tokenizer."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer


def open_model(
    ckpt_dir: str,
    parallel: Parallel,
    tokenizer_file: str | None = None,
    config_file: str | None = None,
    model_type: str | None = None,
    head: str | None = None,
    adapter_dir: str | None = None,
    use_chat_template: bool = False,
    chat_family: str | None = None,
) -> Model:
    """Open a checkpoint and find its tokenizer. Raises UserError when they do not fit each other.

    head: "lm" or "score" when the checkpoint must have it; adapter_dir: an adapter in PEFT's format to add to it;
    chat_family: whose chat template is used where the checkpoint has none, its own family's by default.
    """
    checkpoint = Checkpoint.open(ckpt_dir, config_file, adapter_dir)
    check_whole(checkpoint.folder, parallel.rank, parallel.world_size)
    if head == "score" != checkpoint.config.head:
        raise UserError(
            f"{ckpt_dir}: is a solver, without a score head; verifier_train.py makes a verifier of it"
        )
    if head == "lm" != checkpoint.config.head:
        raise UserError(
            f"{ckpt_dir}: is a verifier, without an output layer, and cannot generate; give a solver"
        )
    check_model_type(checkpoint.config, model_type)
    tokenizer = Tokenizer.find(
        checkpoint.folder,
        tokenizer_file,
        use_chat_template,
        chat_family or model_type or checkpoint.config.family,
    )
    check_vocabulary(tokenizer, checkpoint.config.vocab_size)
    return Model(checkpoint, tokenizer)


def lora_of(settings: dict, checkpoint: Checkpoint) -> LoRAConfig | None:
    """The adapter to train by a script's flags (None: all weights). Raises UserError when the flags contradict each other.

    With --adapter_dir and --lora_rank the adapter is trained on; with --adapter_dir alone it is part of the weights.
    """
    rank, adapter = settings["lora_rank"], checkpoint.adapter
    given = {name: settings.get(name) for name in ("lora_dropout", "lora_targets", "lora_alpha")}
    if rank == -1:
        idle = [f"--{name}" for name, value in given.items() if value]
        if idle:
            raise UserError(f"{', '.join(idle)}: has no effect without --lora_rank")
        if settings["quantize"]:
            raise UserError(
                f"--quantize {settings['quantize']}: quantised weights cannot be trained; give --lora_rank too"
            )
        return None
    if adapter is None:
        targets = tuple(
            name.strip() for name in given["lora_targets"] or default_targets(checkpoint.config)
        )
        gate_and_up = {"w1", "w3"} & set(targets)
        if checkpoint.config.n_experts and gate_and_up and not {"w1", "w2", "w3"} <= set(targets):
            raise UserError(
                f"--lora_targets {','.join(targets)}: peft keeps experts' w1 and w3 in one tensor and would not apply such an "
                "adapter; name w1, w2 and w3 together, or of these w2 alone"
            )
        return LoRAConfig(rank, given["lora_alpha"] or 16.0, given["lora_dropout"] or 0.0, targets)
    own = adapter.lora
    other_targets = given["lora_targets"] and set(given["lora_targets"]) != set(own.targets)
    if rank != own.rank or other_targets or given["lora_alpha"] not in (None, own.alpha):
        raise UserError(
            f"--lora_rank {rank}: {adapter.folder} has rank {own.rank}, alpha {own.alpha:g}, on {','.join(own.targets)}; give these to "
            "train it on, or leave --lora_rank out to train all weights with the adapter added in"
        )
    dropout = adapter.lora.dropout if given["lora_dropout"] is None else given["lora_dropout"]
    return replace(adapter.lora, dropout=dropout)


def check_model_flags(settings: dict, checkpoint: Checkpoint) -> None:
    """Raise UserError for flags that this model has nothing to do with."""
    config = checkpoint.config
    frozen, adapted = settings.get("freeze_layers", 0), settings.get("lora_rank", -1) != -1
    if frozen > config.n_layers or (adapted and frozen == config.n_layers):
        rest = ", and an adapter none elsewhere" if adapted else ""
        raise UserError(
            f"--freeze_layers {frozen}: {checkpoint.folder} has {config.n_layers} layers{rest}"
        )
    if settings.get("router_aux_loss_coef") is not None and not config.n_experts:
        raise UserError(
            f"--router_aux_loss_coef {settings['router_aux_loss_coef']}: the model has no experts to balance"
        )


@dataclass(frozen=True)
class Evaluation:
    """A task and its rows; `golds` are the right answers."""

    task: Task
    rows: list[dict]
    instructions: list[str]
    golds: list[str]


def read_evaluation(task: str, label_file: str) -> Evaluation:
    """A task's label file: rows `{"instruction", "label"}` as `dataset/build.py` writes them, or the official files'."""
    found = find_task(task)
    fields = {
        "instruction": TEXT,
        "question": TEXT,
        "label": LABEL,
        "output": TEXTS,
        "answer": TEXT,
    }
    rows = read_rows(label_file, {}, fields)
    instructions = [row.get("instruction") or row.get("question") for row in rows]
    if None in instructions:
        number = instructions.index(None)
        raise UserError(f'{label_file}: row {number} (from 0) has no "instruction" (or "question")')
    golds = [found.gold_of(row) for row in rows]
    for gold in golds:
        found.grade(
            "", gold
        )  # a gold that the task's rules cannot read is refused here, not after an epoch
    return Evaluation(found, rows, instructions, golds)


def encode(tokenizer: Tokenizer, instruction: str, output: str) -> Sequence:
    """Prompt and response as ids: BOS, the instruction, the output, EOS."""
    prompt = tokenizer.prompt_ids(instruction)
    return Sequence(
        array("i", prompt + tokenizer.response_ids(output)), len(prompt)
    )  # a list takes nine times the memory


def within(
    lengths: list[int], max_seq_len: int, strict: bool, what: str
) -> tuple[list[bool], str | None]:
    """Which lengths fit into max_seq_len, and a warning that counts the others; UserError when `strict`, or none fits."""
    fits = [length <= max_seq_len for length in lengths]
    if all(fits):
        return fits, None
    message = f"{fits.count(False)} of {len(fits)} {what} are longer than --max_seq_len {max_seq_len} (up to {max(lengths)})"
    if strict or not any(fits):
        raise UserError(f"{message}; raise it to {max(lengths)} or shorten them")
    return fits, message


def solver_sequences(
    path: str, tokenizer: Tokenizer, max_seq_len: int, strict: bool
) -> tuple[list[Sequence], str | None]:
    """Training sequences of a solver file, each accepted output a row of its own; and a warning, or None."""
    rows = read_solver_rows(path)
    sequences = [
        encode(tokenizer, row["instruction"], output) for row in rows for output in row["outputs"]
    ]
    fits, warning = within(
        [len(s.tokens) for s in sequences], max_seq_len, strict, f"rows of {path}"
    )
    return [s for s, fit in zip(sequences, fits) if fit], warning


def comparisons(
    path: str, tokenizer: Tokenizer, max_seq_len: int, strict: bool
) -> tuple[list[Comparison], str | None]:
    """Training comparisons of a verifier file; and a warning, or None."""
    rows = read_verifier_rows(path)
    found = [
        Comparison(
            *(
                [encode(tokenizer, row["instruction"], text) for text in row[side]]
                for side in ("chosen", "rejected")
            )
        )
        for row in rows
    ]
    longest = [max(len(s.tokens) for s in c.chosen + c.rejected) for c in found]
    fits, warning = within(longest, max_seq_len, strict, f"rows of {path}")
    return [c for c, fit in zip(found, fits) if fit], warning


def check_log_dir(log_dir: str, *read: str | None) -> None:
    """Raise UserError when a log folder cannot be made or written to, or is a folder that is read."""
    folder = Path(log_dir).resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--log_dir {log_dir}: {existing} is not a folder that can be written to")
    if any(path is not None and Path(path).resolve() == folder for path in read):
        raise UserError(
            f"--log_dir {log_dir}: is a checkpoint that is read; logs need a folder of their own"
        )


def check_writable(path: str, suffix: str, *read: str) -> None:
    """Raise UserError when a file to be written has another suffix, is a folder, is itself read, or has no folder to lie in."""
    target = Path(path)
    if any(Path(other).resolve() == target.resolve() for other in read):
        raise UserError(f"{path}: is read and would be overwritten; write to another file")
    if target.suffix != suffix:
        raise UserError(f"{path}: a {suffix} file is written; name it so")
    if target.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{path}: {existing} is not a folder that can be written to")


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two models read the same ids as the same texts, and write prompts alike."""
    chats = a.chat and a.chat.source, b.chat and b.chat.source
    return (
        a.path.read_bytes() == b.path.read_bytes() and a.bos_id == b.bos_id and chats[0] == chats[1]
    )


def check_same_tokenizer(actor: Model, other: Model) -> None:
    """Raise UserError when two roles read the same ids as different texts."""
    if not same_tokenizer(actor.tokenizer, other.tokenizer):
        files = [
            f"{m.tokenizer.path}" + (f" with {m.tokenizer.chat.name}" if m.tokenizer.chat else "")
            for m in (actor, other)
        ]
        raise UserError(
            f"{files[0]} and {files[1]} differ: a value is learned for each of the policy's tokens, so that both must share "
            "their tokenizer and chat template"
        )


def ppo_prompts(
    path: str, tokenizer: Tokenizer, rule: Task | None, max_seq_len: int
) -> tuple[list[Prompt], str | None]:
    """PPO's prompts; for a rule, with their right answers, which must be there and readable. And a warning, or None."""
    prompts = []
    for number, row in enumerate(read_prompt_rows(path)):
        try:
            gold = rule.gold_of(row) if rule else ""
            if rule:
                rule.grade("", gold)
        except UserError as error:
            raise UserError(f"{path}: row {number} (from 0): {error}") from None
        prompts.append(Prompt(tokenizer.prompt_ids(row["instruction"]), gold, row))
    fits, warning = within(
        [len(p.tokens) + 1 for p in prompts],
        max_seq_len,
        False,
        f"prompts of {path}, with one token more,",
    )
    return [p for p, fit in zip(prompts, fits) if fit], warning
