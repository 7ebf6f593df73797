"""What a PPO run reads, opened and checked before any work."""

from dataclasses import dataclass
from typing import Any

import torch

from src.checkpoint.folder import check_apart
from src.checkpoint.save import check_save
from src.data.encoding import Prompt, ppo_prompts, solver_sequences
from src.data.kept import Sequences
from src.data.mixture import Mixture, read_mixture
from src.data.shards import are_shards
from src.data.sources import Source
from src.data.stream import Stream
from src.errors import UserError
from src.evaluation.tasks import Task, find_task
from src.evaluation.training import SolverEvaluation
from src.inputs import check_log_dir
from src.logs import RunLog
from src.parallel.setup import Parallel
from src.ppo.fit import DEFAULT_KL_COEF, changed_rewards, read_state
from src.ppo.kl import KLController
from src.ppo.layouts import Layouts
from src.ppo.rewards.file import UserScore, load_score
from src.ppo.setup import OpenedRoles, open_roles
from src.settings.ppo import PPOTrainSettings
from src.trainer.inputs import Places, check_vocabulary, source_of


@dataclass(frozen=True)
class PPOInputs:
    """Models, prompts, and where earlier runs left the policy and the value model.

    rule: whose rule is applied in the reward; mix: supervised rows or texts; policy_state,
    value_state: what lies beside their weights; notes: what a user should know of the rows, a
    sentence each; mixture, mix_mixture: of how many prompts and supervised rows there are.
    """

    roles: OpenedRoles
    evaluation: SolverEvaluation
    rule: Task | None
    prompts: list[Prompt]
    mix: Sequences | Stream
    policy_state: dict[str, Any]
    value_state: dict[str, Any]
    notes: list[str]
    mixture: Mixture
    mix_mixture: Mixture | None

    @classmethod
    def read(
        cls, settings: PPOTrainSettings, parallel: Parallel, dtype: torch.dtype
    ) -> "PPOInputs":
        """Read everything. Raises UserError, before any work, for whatever is wrong."""
        roles, max_seq_len = settings.roles, settings.batches.max_seq_len
        if roles.actor_save_dir:  # a dry run may have none
            check_places(settings)

        # Models with their tokenizers.
        opened = open_roles(settings, parallel, dtype)
        tokenizer = opened.actor.tokenizer
        places = Places.of(settings.saving.log_dir, roles.actor_save_dir)
        if roles.actor_save_dir and settings.evaluation.keep_best:
            check_save(places.best, opened.actor.checkpoint, dtype, opened.actor.own_dtype)

        # What is measured, and what is rewarded.
        max_new_tokens = settings.generation.max_new_tokens
        evaluation = SolverEvaluation.read(
            settings.evaluation, tokenizer, max_new_tokens, max_seq_len
        )
        rule = None
        if "rule" in settings.rewards.names:
            rule = find_task(settings.evaluation.task or "GSM8K", settings.evaluation.rule)

        # Rows.
        ptx_file = settings.pretraining.ptx_file
        reward_file = settings.rewards.reward_file
        rows_are_read = reward_file is not None
        prompts, notes, mixture = read_mixture(
            source_of(settings.prompts),
            lambda path: ppo_prompts(path, tokenizer, rule, max_seq_len, rows_are_read),
        )
        mix: Sequences | Stream = []
        mix_mixture = None
        if ptx_file is not None and are_shards(ptx_file):
            part = parallel.rank, parallel.world_size
            mix = Stream.open(ptx_file, max_seq_len, True, settings.run.seed, *part)
            check_vocabulary(mix, tokenizer, opened.actor.checkpoint.config.vocab_size, *part)
        elif ptx_file is not None:
            mix, more, mix_mixture = read_mixture(
                Source(ptx_file), lambda path: solver_sequences(path, tokenizer, max_seq_len)
            )
            notes += more
        if reward_file is not None:
            score = UserScore(reward_file, load_score(reward_file))
            if parallel.is_main:
                score.try_out(prompts[0].row)

        # Where earlier runs left the models.
        states = read_state(roles.actor_ckpt_dir), read_state(roles.critic_ckpt_dir)
        notes += evaluation.notes
        inputs = cls(opened, evaluation, rule, prompts, mix, *states, notes, mixture, mix_mixture)
        if not inputs.has_reference(settings):
            _check_no_reference(settings)
        return inputs

    def kl_controller(self, settings: PPOTrainSettings) -> KLController:
        """By the settings, or from where the actor's own PPO run left off."""
        penalty = settings.penalty
        kl_coef = penalty.kl_coef
        if kl_coef is None:
            kl_coef = self.policy_state.get("kl_coef", DEFAULT_KL_COEF)
        return KLController(kl_coef, penalty.kl_target, penalty.kl_horizon)

    def has_reference(self, settings: PPOTrainSettings) -> bool:
        """Whether there is a KL penalty, and so a reference."""
        return self.kl_controller(settings).kl_coef > 0

    def announce(self, settings: PPOTrainSettings, layouts: Layouts, log: RunLog) -> None:
        """Say in the log what a user should know before training."""
        self.roles.actor.announce(log)
        for note in self.notes:
            log.warning(note)
        changes = changed_rewards(self.policy_state, settings.rewards)
        if changes:
            folder = settings.roles.actor_ckpt_dir
            log.warning(f"the run that left {folder} had other rewards: {changes}")
        if self.roles.moments:
            mean, std = self.roles.moments
            log.info(f"the verifier's scores are centred by {mean:.4f} and divided by {std:.4f}")
        if self.roles.translates:
            log.info("the verifier has another tokenizer and reads the texts")
        if settings.roles.offload and not torch.cuda.is_available():
            log.warning(
                "--offload: on the CPU the device's memory is the host's: roles are moved, and "
                "nothing is saved"
            )
        kl_coef = self.kl_controller(settings).kl_coef
        log.info(
            f"{self.mixture.n_rows} prompts; {layouts.described}; "
            f"advantages: {settings.advantages.advantage}; kl_coef {kl_coef}"
            f"{'' if self.has_reference(settings) else ': no reference'}"
        )


def check_places(settings: PPOTrainSettings) -> None:
    """Raise UserError when what is written would replace what is read, or cannot be written."""
    roles = settings.roles
    places = Places.of(settings.saving.log_dir, roles.actor_save_dir)
    folders = roles.actor_ckpt_dir, roles.critic_ckpt_dir, roles.reward_model_ckpt_dir
    read = {
        "actor_ckpt_dir": roles.actor_ckpt_dir,
        "critic_ckpt_dir": roles.critic_ckpt_dir,
        "reward_model_ckpt_dir": roles.reward_model_ckpt_dir,
        "train_file": settings.prompts.train_file or None,
        "ptx_file": settings.pretraining.ptx_file,
        "log_dir": places.logs,
        "dump_rollouts": settings.rollouts.dump_rollouts,
    }
    written = {
        "actor_save_dir": roles.actor_save_dir,
        "critic_save_dir": roles.critic_save_dir,
        "keep_best": places.best if settings.evaluation.keep_best else None,
    }
    check_log_dir(places.logs, *folders)
    check_apart({flag: path for flag, path in written.items() if path is not None}, read)
    if settings.rollouts.dump_rollouts is not None:
        check_log_dir(settings.rollouts.dump_rollouts, *folders)


def _check_no_reference(settings: PPOTrainSettings) -> None:
    penalty = settings.penalty
    if penalty.kl or penalty.kl_target or penalty.ref_ema is not None:
        raise UserError(
            "--kl, --kl_target, --ref_ema: have no effect with --kl_coef 0, which needs no "
            "reference"
        )
