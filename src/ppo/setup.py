"""From checkpoints to roles: what a PPO run's flags say of its models is opened and checked here, and then loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch

from src.checkpoint.adapter import Adapter
from src.checkpoint.folder import find_tokenizer
from src.checkpoint.load import load_model, load_sharing
from src.checkpoint.save import check_save, read_score_moments
from src.checkpoint.source import adapter_on
from src.errors import UserError
from src.evaluation.tasks import Task
from src.inputs import (
    Model,
    check_model_flags,
    check_same_tokenizer,
    lora_of,
    open_model,
    same_tokenizer,
)
from src.models.lora import LoRAConfig
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.ppo.rewards import (
    FileReward,
    FormatReward,
    LengthReward,
    OverlongReward,
    Reward,
    RuleReward,
    VerifierReward,
    load_score,
    translator,
)
from src.ppo.roles import Role, Stage
from src.trainer.fit import prepare
from src.trainer.optimizer import Optimizer


@dataclass(frozen=True)
class Opened:
    """The checkpoints of a run, looked through but not loaded.

    adapters: "value" and "reward" on a shared trunk; moments: of the verifier's scores.
    """

    actor: Model
    critic: Model | None
    verifier: Model | None
    lora: LoRAConfig | None
    critic_lora: LoRAConfig | None
    adapters: dict[str, Adapter | None]
    moments: tuple[float, float] | None

    @property
    def translates(self) -> bool:
        """Whether the verifier has a tokenizer of its own."""
        return self.verifier is not None and not same_tokenizer(
            self.actor.tokenizer, self.verifier.tokenizer
        )


def open_roles(settings: dict, parallel: Parallel, dtype: torch.dtype) -> Opened:
    """Open what the flags name. Raises UserError for what does not fit together, before anything is loaded."""
    s = settings
    chat = {"use_chat_template": s["use_chat_template"], "chat_family": s["model_type"]}
    actor = open_model(
        s["actor_ckpt_dir"],
        parallel,
        s["tokenizer_file"],
        s["config_file"],
        s["model_type"],
        head="lm",
        **chat,
    )
    check_model_flags(s, actor.checkpoint)
    check_save(s["actor_save_dir"], actor.checkpoint, dtype)
    critic = verifier = moments = None
    adapters: dict[str, Adapter | None] = {}
    if s["shared_trunk"]:
        critic, verifier = (
            actor if s[flag] is not None else None
            for flag in ("critic_ckpt_dir", "reward_model_ckpt_dir")
        )
        if critic:
            anew = Path(s["critic_ckpt_dir"]).resolve() == Path(s["actor_ckpt_dir"]).resolve()
            adapters["value"] = None if anew else adapter_on(actor.checkpoint, s["critic_ckpt_dir"])
        if verifier:
            adapters["reward"] = adapter_on(actor.checkpoint, s["reward_model_ckpt_dir"])
            if adapters["reward"].score is None:
                raise UserError(
                    f"{s['reward_model_ckpt_dir']}: its adapter has no score head; verifier_train.py makes one"
                )
    else:
        if s["critic_ckpt_dir"] is not None:
            critic = open_model(s["critic_ckpt_dir"], parallel, s["tokenizer_file"], **chat)
            check_model_flags(s, critic.checkpoint)
            check_same_tokenizer(actor, critic)
        if s["reward_model_ckpt_dir"] is not None:
            verifier = open_model(
                s["reward_model_ckpt_dir"],
                parallel,
                _verifier_tokenizer(s, actor),
                head="score",
                **chat,
            )
    if critic:
        check_save(s["critic_save_dir"], critic.checkpoint, dtype)
    if verifier:
        moments = read_score_moments(Path(s["reward_model_ckpt_dir"]))
    critic_lora = lora_of(s, critic.checkpoint) if critic else None
    return Opened(
        actor, critic, verifier, lora_of(s, actor.checkpoint), critic_lora, adapters, moments
    )


def _verifier_tokenizer(settings: dict, actor: Model) -> str | None:
    """The flag's; else whatever lies in the verifier's folder; else the actor's."""
    if settings["reward_tokenizer_file"] or find_tokenizer(Path(settings["reward_model_ckpt_dir"])):
        return settings["reward_tokenizer_file"]
    return str(actor.tokenizer.path)


def load_roles(
    opened: Opened, settings: dict, parallel: Parallel, dtype: torch.dtype, with_reference: bool
) -> Stage:
    """The roles with their optimizers. With --offload each goes to host memory before the next one is loaded."""
    s, o = settings, opened
    stage = Stage(s["offload"])
    common = {"seed": s["seed"], "quantize": s["quantize"]}

    def trained(name: str, model: Transformer, division: Parallel) -> Role:
        prepare(model, s, division)
        optimizer = Optimizer(
            model, division, s["weight_decay"], s["max_grad_norm"], eps=1e-5, zero=s["zero"]
        )
        return stage.add(Role(name, model, division, optimizer))

    def frozen(name: str, model: Transformer, division: Parallel) -> Role:
        return stage.add(Role(name, model.requires_grad_(False), division))

    actor = o.actor.checkpoint
    policy = load_model(actor, parallel, dtype, "lm", lora=o.lora, **common)
    if with_reference:  # first: --freeze_layers and the like are the policy's alone
        if o.lora is not None and s["ref_ema"] is None and actor.adapter is None:
            reference = load_sharing(policy, parallel, "lm")  # the policy with its adapter off
        else:
            reference = load_model(actor, parallel, dtype, "lm", **common)
    trained("policy", policy, parallel)
    if with_reference:
        frozen("reference", reference, parallel)
    if o.critic:
        if s["shared_trunk"]:
            value = load_sharing(
                policy, parallel, "score", s["seed"], o.critic_lora, o.adapters["value"]
            )
            trained("value", value, parallel)
        else:
            division = _division(s["critic_model_parallel_size"], parallel)
            trained(
                "value",
                load_model(
                    o.critic.checkpoint, division, dtype, "score", lora=o.critic_lora, **common
                ),
                division,
            )
    if o.verifier:
        if s["shared_trunk"]:
            frozen(
                "reward",
                load_sharing(policy, parallel, "score", adapter=o.adapters["reward"]),
                parallel,
            )
        else:
            division = _division(s["reward_model_parallel_size"], parallel)
            frozen(
                "reward",
                load_model(o.verifier.checkpoint, division, dtype, "score", **common),
                division,
            )
    return stage


def make_rewards(
    opened: Opened, settings: dict, stage: Stage, parallel: Parallel, rule: Task | None
) -> list[tuple[float, Reward]]:
    """(weight, reward) of each of --reward."""
    s, tokenizer, names = settings, opened.actor.tokenizer, settings["reward"] or ["verifier"]

    def verifier() -> Reward:
        translate = translator(tokenizer, opened.verifier.tokenizer) if opened.translates else None
        limits = s["max_batch_size"], s["max_tokens_per_batch"]
        return VerifierReward(
            stage.roles["reward"], parallel, *limits, *(opened.moments or (0.0, 1.0)), translate
        )

    make = {
        "verifier": verifier,
        "rule": lambda: RuleReward(rule, tokenizer),
        "file": lambda: FileReward(
            s["reward_file"], load_score(s["reward_file"]), tokenizer, parallel
        ),
        "format": lambda: FormatReward(s["format_pattern"], tokenizer),
        "length": lambda: LengthReward(s["max_new_tokens"]),
        "overlong": lambda: OverlongReward(s["max_new_tokens"], s["overlong_margin"]),
    }
    return list(zip(s["reward_weights"] or [1.0] * len(names), (make[name]() for name in names)))


def _division(mp_size: int | None, parallel: Parallel) -> Parallel:
    return parallel if mp_size in (None, parallel.mp_size) else parallel.divided(mp_size)
