"""From checkpoints to roles: what a PPO run's settings say of its models is opened, and loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from src.checkpoint.adapter import Adapter
from src.checkpoint.load import load_model, load_sharing
from src.checkpoint.save import check_save, read_score_moments
from src.checkpoint.source import adapter_on
from src.errors import UserError
from src.evaluation.tasks import Task
from src.inputs import (
    OpenedModel,
    check_same_tokenizer,
    check_trainable,
    lora_of,
    open_model,
    read_alike,
    same_tokenizer,
    verifier_tokenizer,
)
from src.models.fp8 import check_device
from src.models.lora import LoRAConfig
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.ppo.layouts import Layouts
from src.ppo.rewards import RewardInputs
from src.ppo.roles import Role, Stage
from src.settings.model import ModelSettings
from src.settings.ppo import PPOTrainSettings
from src.trainer.fit import prepare
from src.trainer.optimizer import Optimizer

ADAM_EPSILON = 1e-5  # as PPO's implementations have it, for policy and value model


@dataclass(frozen=True)
class OpenedRoles:
    """The checkpoints of a run, looked through but not loaded.

    adapters: "value" and "reward" on a shared trunk; moments: of the verifier's scores.
    """

    actor: OpenedModel
    critic: OpenedModel | None
    verifier: OpenedModel | None
    lora: LoRAConfig | None
    critic_lora: LoRAConfig | None
    adapters: dict[str, Adapter | None]
    moments: tuple[float, float] | None

    @property
    def translates(self) -> bool:
        """Whether the verifier has a tokenizer of its own."""
        if self.verifier is None:
            return False
        return not same_tokenizer(self.actor.tokenizer, self.verifier.tokenizer)


def open_roles(settings: PPOTrainSettings, parallel: Parallel, dtype: torch.dtype) -> OpenedRoles:
    """Open what the settings name.

    Raises UserError for what does not fit together, before anything is loaded.
    """
    if settings.run.fp8:
        check_device(parallel.device)
    roles, lora = settings.roles, settings.lora
    own_dtype = settings.run.dtype is None

    # The actor, whose family's chat template is everybody's.
    actor = open_model(
        ModelSettings(
            ckpt_dir=roles.actor_ckpt_dir,
            model_type=roles.model_type,
            config_file=roles.config_file,
            tokenizer_file=roles.tokenizer_file,
            use_chat_template=roles.use_chat_template,
            special_tokens=roles.special_tokens,
            chat_date=roles.chat_date,
        ),
        parallel,
        head="lm",
        own_dtype=own_dtype,
    )
    _check_trainable(settings, actor)
    if roles.actor_save_dir:
        check_save(roles.actor_save_dir, actor.checkpoint, dtype, own_dtype)

    critic = verifier = moments = None
    adapters: dict[str, Adapter | None] = {}
    if roles.shared_trunk:
        # Value and reward are adapters on the actor's weights.
        critic = actor if roles.critic_ckpt_dir is not None else None
        verifier = actor if roles.reward_model_ckpt_dir is not None else None
        adapters = _trunk_adapters(settings, actor)
    else:
        if roles.critic_ckpt_dir is not None:
            source = read_alike(roles, roles.critic_ckpt_dir, roles.tokenizer_file)
            critic = open_model(source, parallel, chat_family=roles.model_type, own_dtype=own_dtype)
            _check_trainable(settings, critic)
            check_same_tokenizer(actor, critic)
        if roles.reward_model_ckpt_dir is not None:
            folder, given = roles.reward_model_ckpt_dir, roles.reward_tokenizer_file
            source = read_alike(roles, folder, verifier_tokenizer(folder, given, actor.tokenizer))
            verifier = open_model(source, parallel, head="score", chat_family=roles.model_type)
    if critic and roles.critic_save_dir:
        check_save(roles.critic_save_dir, critic.checkpoint, dtype, own_dtype)
    if verifier and roles.reward_model_ckpt_dir is not None:
        moments = read_score_moments(Path(roles.reward_model_ckpt_dir))
    critic_lora = lora_of(lora, critic.checkpoint) if critic else None
    actor_lora = lora_of(lora, actor.checkpoint)
    return OpenedRoles(actor, critic, verifier, actor_lora, critic_lora, adapters, moments)


def _check_trainable(settings: PPOTrainSettings, model: OpenedModel) -> None:
    checkpoint = model.checkpoint
    where = str(checkpoint.folder)
    check_trainable(settings.optimizer, settings.lora, checkpoint.config, where)


def _trunk_adapters(settings: PPOTrainSettings, actor: OpenedModel) -> dict[str, Adapter | None]:
    """The value model's adapter on the actor's weights (None: it starts anew), the verifier's."""
    roles = settings.roles
    adapters: dict[str, Adapter | None] = {}
    if roles.critic_ckpt_dir is not None:
        is_actor = Path(roles.critic_ckpt_dir).resolve() == Path(roles.actor_ckpt_dir).resolve()
        adapters["value"] = (
            None if is_actor else adapter_on(actor.checkpoint, roles.critic_ckpt_dir)
        )
    if roles.reward_model_ckpt_dir is not None:
        adapter = adapter_on(actor.checkpoint, roles.reward_model_ckpt_dir)
        if adapter.score is None:
            raise UserError(
                f"{roles.reward_model_ckpt_dir}: its adapter has no score head; verifier_train.py "
                "makes one"
            )
        adapters["reward"] = adapter
    return adapters


def together_on_device(
    names: list[str], trained: list[str], settings: PPOTrainSettings
) -> list[list[str]]:
    """Roles that are on the device at the same time while one of them is trained, by name."""
    if not settings.roles.offload:
        return [names]
    return [trained] if settings.updates.update == "together" else [[name] for name in trained]


def load_roles(
    opened: OpenedRoles,
    settings: PPOTrainSettings,
    layouts: Layouts,
    parallel: Parallel,
    dtype: torch.dtype,
    with_reference: bool,
) -> Stage:
    """The roles with their optimizers, each in its layout.

    With --offload each goes to host memory before the next one is loaded.
    """
    roles, run = settings.roles, settings.run
    stage = Stage(roles.offload, parallel.device)
    common: dict[str, Any] = {"seed": run.seed, "quantize": settings.lora.quantize}

    def how(division: Parallel) -> dict[str, Any]:
        """What is said of a model in training."""
        layout, rests = division.layout, run.offload_params
        return {**common, "zero": layout.zero, "offload": rests, "stages_per_rank": layout.vp}

    def trained(name: str, model: Transformer, division: Parallel) -> Role:
        layout = division.layout
        own = replace(run, zero=cast(Any, layout.zero), sequence_parallel=layout.sp)
        prepare(model, settings.optimizer, own, division)
        optimizer = Optimizer.of(settings.optimizer, model, division, own, eps=ADAM_EPSILON)
        return stage.add(Role(name, model, division, optimizer))

    def frozen(name: str, model: Transformer, division: Parallel) -> Role:
        return stage.add(Role(name, model.requires_grad_(False), division))

    # The policy, and the reference, which is it before anything was trained. The reference first:
    # --freeze_layers and the like are the policy's alone.
    actor = opened.actor.checkpoint
    policy = load_model(actor, parallel, dtype, "lm", lora=opened.lora, **how(parallel))
    reference, beside = None, parallel.laid_out(layouts.ref_inf)
    if with_reference:
        stays = settings.penalty.ref_ema is None
        # Of weights that ranks share, what puts them together belongs to one model.
        is_plain = not policy.shard_stage and layouts.ref_inf.is_like(layouts.actor_train)
        if opened.lora is not None and stays and actor.adapter is None and is_plain:
            # The policy with its adapter off.
            reference, beside = load_sharing(policy, parallel, "lm"), parallel
        else:
            reference = load_model(actor, beside, dtype, "lm", **common)
    trained("policy", policy, parallel)
    if reference is not None:
        frozen("reference", reference, beside)

    # The value model.
    if opened.critic:
        if roles.shared_trunk:
            adapter, lora = opened.adapters["value"], opened.critic_lora
            value = load_sharing(policy, parallel, "score", run.seed, lora, adapter)
            trained("value", value, parallel)
        else:
            division = parallel.laid_out(layouts.critic_train)
            checkpoint, lora = opened.critic.checkpoint, opened.critic_lora
            value = load_model(checkpoint, division, dtype, "score", lora=lora, **how(division))
            trained("value", value, division)

    # The reward model.
    if opened.verifier:
        if roles.shared_trunk:
            reward = load_sharing(policy, parallel, "score", adapter=opened.adapters["reward"])
            frozen("reward", reward, parallel)
        else:
            division = parallel.laid_out(layouts.rew_inf)
            reward = load_model(opened.verifier.checkpoint, division, dtype, "score", **common)
            frozen("reward", reward, division)
    return stage


def reward_inputs(
    opened: OpenedRoles,
    settings: PPOTrainSettings,
    stage: Stage,
    parallel: Parallel,
    rule: Task | None,
) -> RewardInputs:
    """What the rewards may need. rule: whose rule is applied, when one is."""
    other = opened.verifier.tokenizer if opened.verifier and opened.translates else None
    tokenizer = opened.actor.tokenizer
    return RewardInputs(settings, parallel, stage, tokenizer, other, opened.moments, rule)
