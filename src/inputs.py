"""What the scripts open before any work: models with their tokenizers, and places to write to.

Checked on every rank, and refused with one voice (`agreed`).
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.checkpoint.folder import find_tokenizer
from src.checkpoint.fresh import FreshCheckpoint
from src.checkpoint.manifest import check_whole
from src.checkpoint.save import save_model
from src.checkpoint.source import Checkpoint, check_model_type
from src.data.chat import has_template
from src.data.export import write_tokenizer
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.logs import RunLog
from src.models.config import ModelConfig
from src.models.lora import LoRAConfig, default_targets
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.settings.model import AdaptedModelSettings, ModelSettings, TextModelSettings
from src.settings.training import LoRASettings, OptimizerSettings


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint whose files were looked through, and its tokenizer.

    own_dtype: whether what is trained of it is saved in its own dtype (no other was asked for).
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    own_dtype: bool = True

    def announce(self, log: RunLog) -> None:
        """Say in the log what a user should know of how texts are read."""
        if self.tokenizer.path.parent == self.checkpoint.adapter_folder:
            log.info(f"the tokenizer is the adapter's own, {self.tokenizer.path}")
        for note in self.tokenizer.notes():
            log.warning(note)
        unused = self.checkpoint.config.ids_without_text
        if unused:
            count = sum(stop - start for start, stop in unused)
            log.info(
                f"{count} of the model's {self.checkpoint.config.vocab_size} ids have no token in "
                f"{self.tokenizer.path} (from {unused[0][0]} on): their probability is 0"
            )

    def save(
        self,
        model: Transformer,
        parallel: Parallel,
        save_dir: str,
        notes: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Write a model that was trained from this checkpoint, with its tokenizer.

        notes: more files, by their names, written as JSON.
        """
        config, source = model.config, self.checkpoint.folder

        def side_files(folder: Path) -> None:
            scores = config.head == "score"
            write_tokenizer(self.tokenizer, folder, source, config.vocab_size, scores)

        save_model(model, parallel, save_dir, self.checkpoint, side_files, notes, self.own_dtype)


def open_model(
    model: ModelSettings,
    parallel: Parallel,
    head: str | None = None,
    chat_family: str | None = None,
    own_dtype: bool = True,
    seed: int = 0,
) -> OpenedModel:
    """Open a checkpoint and find its tokenizer. Raises UserError when they do not fit each other.

    Without --ckpt_dir it is one of random weights, by --config_file.

    head: "lm" or "score" when the checkpoint must have it; chat_family: whose chat template is used
    where the checkpoint has none, its own family's by default; own_dtype: see `OpenedModel`; seed:
    of random weights.
    """
    if model.ckpt_dir:
        checkpoint = Checkpoint.open(model.ckpt_dir, model.config_file, model.adapter_dir)
        check_whole(checkpoint.folder, parallel.rank, parallel.world_size)
    else:
        assert model.config_file is not None, "the settings want one of the two"
        checkpoint = FreshCheckpoint(model.config_file, model.model_type, seed)
    if head == "score" and checkpoint.config.head != "score":
        raise UserError(
            f"{model.ckpt_dir}: is a solver, without a score head; verifier_train.py makes a "
            "verifier of it"
        )
    if head == "lm" and checkpoint.config.head != "lm":
        what = "is a verifier" if checkpoint.config.head == "score" else "is a trunk alone"
        raise UserError(
            f"{model.ckpt_dir}: {what}, without an output layer ({checkpoint.naming.output}), and "
            "cannot generate; give a solver"
        )
    check_model_type(checkpoint.config, model.model_type)
    tokenizer = open_tokenizer(model, checkpoint, chat_family)
    if checkpoint.config.head == "lm":
        unused = tuple(tokenizer.without_text(checkpoint.config.vocab_size))
        checkpoint.config = replace(checkpoint.config, ids_without_text=unused)
    return OpenedModel(checkpoint, tokenizer, own_dtype)


def open_tokenizer(
    model: AdaptedModelSettings, checkpoint: Checkpoint, chat_family: str | None = None
) -> Tokenizer:
    """The tokenizer that the settings name, or that lies with the checkpoint, which it must fit.

    An adapter's own counts before its base's. chat_family: see `open_model`.
    """
    file, adapter = model.tokenizer_file, checkpoint.adapter_folder
    if file is None and adapter is not None:
        found = find_tokenizer(checkpoint.folder, adapter)
        file = None if found is None else str(found)
        # A template is read with the tokenizer beside it: without one, it would be passed over.
        has_own = found is not None and found.parent == adapter
        if model.use_chat_template and not has_own and has_template([adapter]):
            raise UserError(
                f"{adapter}: has a chat template and no tokenizer to read it with; copy the "
                f"tokenizer's files there, from {checkpoint.folder} if it is that one's, or take "
                "the template out"
            )
    tokenizer = Tokenizer.find(
        checkpoint.folder,
        file,
        model.use_chat_template,
        chat_family or model.model_type or checkpoint.config.family,
        model.special_tokens,
        model.chat_date,
    )
    tokenizer.fit(checkpoint.config.vocab_size)
    return tokenizer


def lora_of(lora: LoRASettings, checkpoint: Checkpoint) -> LoRAConfig | None:
    """The adapter to train (None: all weights). Raises UserError where the checkpoint's is another.

    With --adapter_dir and --lora_rank the adapter is trained on; with --adapter_dir alone it is
    part of the weights.
    """
    if not lora.is_on:
        return None
    adapter = checkpoint.adapter
    if adapter is None:
        return adapter_config(lora, checkpoint.config)
    trained = adapter.lora
    if adapter.fixed:
        raise UserError(
            f"--lora_rank {lora.lora_rank}: {adapter.folder} cannot be trained on: "
            f"{adapter.fixed}; leave --lora_rank out to train all weights with the adapter added "
            "in, or merge it (checkpoint_merge.py) and start a new one"
        )
    other_targets = lora.lora_targets and set(lora.lora_targets) != set(trained.targets)
    other_alpha = lora.lora_alpha not in (None, trained.alpha)
    if lora.lora_rank != trained.rank or other_targets or other_alpha:
        raise UserError(
            f"--lora_rank {lora.lora_rank}: {adapter.folder} has rank {trained.rank}, alpha "
            f"{trained.alpha:g}, on {','.join(trained.targets)}; give these to train it on, or "
            "leave --lora_rank out to train all weights with the adapter added in"
        )
    return replace(trained, dropout=trained.dropout if lora.dropout is None else lora.dropout)


def adapter_config(lora: LoRASettings, config: ModelConfig) -> LoRAConfig:
    """A new adapter on a model. Raises UserError for targets that peft could not apply."""
    targets = tuple(name.strip() for name in lora.lora_targets or default_targets(config))
    gate_and_up = {"w1", "w3"} & set(targets)
    if config.n_experts and gate_and_up and not {"w1", "w2", "w3"} <= set(targets):
        raise UserError(
            f"--lora_targets {','.join(targets)}: peft keeps experts' w1 and w3 in one tensor and "
            "would not apply such an adapter; name w1, w2 and w3 together, or of these w2 alone"
        )
    return LoRAConfig(lora.lora_rank, lora.lora_alpha or 16.0, lora.dropout or 0.0, targets)


def check_trainable(
    optimizer: OptimizerSettings, lora: LoRASettings, config: ModelConfig, where: str
) -> None:
    """Raise UserError for settings that this model has nothing to do with. where: its folder."""
    frozen = optimizer.freeze_layers
    if frozen > config.n_layers or (lora.is_on and frozen == config.n_layers):
        rest = ", and an adapter none elsewhere" if lora.is_on else ""
        raise UserError(f"--freeze_layers {frozen}: {where} has {config.n_layers} layers{rest}")
    balance = optimizer.router_aux_loss_coef
    if balance is not None and not config.n_experts:
        raise UserError(f"--router_aux_loss_coef {balance}: the model has no experts to balance")


def check_log_dir(log_dir: str, *read: str | None) -> None:
    """Raise UserError when a log folder cannot be written to, or is a folder that is read."""
    folder = Path(log_dir).resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--log_dir {log_dir}: {existing} is not a folder that can be written to")
    if any(path is not None and Path(path).resolve() == folder for path in read):
        raise UserError(
            f"--log_dir {log_dir}: is a checkpoint that is read; logs need a folder of their own"
        )


def check_writable(path: str, suffix: str, *read: str) -> None:
    """Raise UserError when a file cannot be written.

    It has another suffix, is a folder, is itself read, or has no folder to lie in.
    """
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


def read_alike(
    model: TextModelSettings, ckpt_dir: str, tokenizer_file: str | None
) -> ModelSettings:
    """Another model, which reads instructions as `model` does."""
    return ModelSettings(
        ckpt_dir=ckpt_dir,
        tokenizer_file=tokenizer_file,
        use_chat_template=model.use_chat_template,
        special_tokens=model.special_tokens,
        chat_date=model.chat_date,
    )


def verifier_tokenizer(folder: str, given: str | None, solver: Tokenizer) -> str | None:
    """The one that is given; else (None) whatever lies in the verifier's folder; else the solver's.

    folder: the verifier's.
    """
    return given or (None if find_tokenizer(Path(folder)) else str(solver.path))


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two models read the same ids as the same texts, and write prompts alike."""
    return a.identity == b.identity


def check_same_tokenizer(actor: OpenedModel, other: OpenedModel) -> None:
    """Raise UserError when two roles read the same ids as different texts."""
    if not same_tokenizer(actor.tokenizer, other.tokenizer):
        files = [
            f"{m.tokenizer.path}" + (f" with {m.tokenizer.chat.name}" if m.tokenizer.chat else "")
            for m in (actor, other)
        ]
        raise UserError(
            f"{files[0]} and {files[1]} differ: a value is learned for each of the policy's "
            "tokens, so that both must share their tokenizer and chat template"
        )
