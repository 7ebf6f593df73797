"""A PPO run put together from its settings, its inputs and its loaded roles."""

from dataclasses import replace
from functools import partial

from src.evaluation.training import Evaluations
from src.generation.engine import Engine
from src.generation.from_settings import sampling_of
from src.generation.relayout import RelaidEngine
from src.inputs import OpenedModel
from src.logs import RunLog
from src.models.exchange import is_spread
from src.parallel.setup import Parallel
from src.ppo.dump import RolloutDump, SampleTexts
from src.ppo.fit import STATE_FILE
from src.ppo.inputs import PPOInputs
from src.ppo.layouts import Layouts
from src.ppo.pretraining import PretrainingMix
from src.ppo.rewards import make_rewards
from src.ppo.roles import Stage
from src.ppo.setup import reward_inputs, together_on_device
from src.ppo.trainer import PPO
from src.settings.ppo import PPOSettings, PPOTrainSettings
from src.trainer.activations import described, held_bytes, limited


def make_ppo(
    settings: PPOTrainSettings,
    inputs: PPOInputs,
    layouts: Layouts,
    stage: Stage,
    parallel: Parallel,
    log: RunLog,
) -> PPO:
    """The iteration with all that it works with, as an earlier run left it."""
    tokenizer = inputs.roles.actor.tokenizer
    settings = with_token_limit(settings, stage, parallel)
    for line in described(settings.batches.max_tokens_per_batch):
        log.info(line)
    ppo = PPO(
        stage,
        make_rewards(reward_inputs(inputs.roles, settings, stage, parallel, inputs.rule)),
        engine_of(settings, layouts, stage, parallel),
        sampling_of(settings.generation, settings.run.seed),
        tokenizer.stop_ids,
        inputs.kl_controller(settings),
        settings,
        parallel,
        mix_of(settings, inputs, parallel),
        None if layouts.critic_inf.is_like(layouts.critic_train) else layouts.critic_inf,
    )
    ppo.state.take_up(inputs.policy_state, inputs.value_state)
    rollouts = settings.rollouts
    if rollouts.log_samples:
        ppo.watch.append(SampleTexts(rollouts.log_samples, tokenizer, log, parallel))
    if rollouts.dump_rollouts is not None:
        ppo.watch.append(RolloutDump(rollouts.dump_rollouts, tokenizer, parallel))
    return ppo


def with_token_limit(
    settings: PPOTrainSettings, stage: Stage, parallel: Parallel
) -> PPOTrainSettings:
    """With a limit on the tokens of a forward, on a GPU where the settings have none."""
    trained = stage.trained()
    held = max(
        held_bytes(
            [stage.roles[name].model for name in names],
            [trained[name][1] for name in names if name in trained],
        )
        for names in together_on_device(list(stage.roles), list(trained), settings)
    )
    batches = limited(settings.batches, list(trained.values()), held, parallel)
    return replace(settings, batches=batches)


def engine_of(
    settings: PPOSettings, layouts: Layouts, stage: Stage, parallel: Parallel
) -> Engine | RelaidEngine:
    """Rollouts in the policy's own layout, or in another (--actor_gen)."""
    policy = stage.roles["policy"].model
    limits = (
        settings.rollouts.rollout_batch_size,
        settings.batches.max_seq_len,
        settings.generation.kv_cache_gb,
    )
    if layouts.actor_gen.is_like(layouts.actor_train) and not is_spread(policy):
        return Engine(policy, parallel, *limits)
    return RelaidEngine(policy, parallel, layouts.actor_gen, *limits)


def mix_of(
    settings: PPOTrainSettings, inputs: PPOInputs, parallel: Parallel
) -> PretrainingMix | None:
    """Supervised rows beside the rewards, if there are any."""
    if not inputs.mix:
        return None
    rollouts_per_step = settings.rollouts.max_buffer_size // settings.updates.mini_batches
    per_step = settings.pretraining.ptx_batch_size or max(1, rollouts_per_step)
    return PretrainingMix(inputs.mix, per_step, settings, parallel.device, inputs.mix_mixture)


def save_role(ppo: PPO, name: str, base: OpenedModel, save_dir: str) -> None:
    """Write a trained role, and beside it what a later run goes on from. base: what it began as."""
    role, state = ppo.stage.roles[name], ppo.state.beside_weights()[name]
    with ppo.stage.at_work(name):
        base.save(role.model, role.parallel, save_dir, {STATE_FILE: state} if state else None)


def evaluations_of(
    ppo: PPO, settings: PPOTrainSettings, inputs: PPOInputs, best_dir: str, log: RunLog
) -> Evaluations:
    """The policy's evaluation; the best policy is saved to best_dir."""
    actor = inputs.roles.actor

    def evaluate(moment: str, number: int) -> dict[str, float]:
        with ppo.stage.at_work("policy"):
            policy, parallel = ppo.policy.model, ppo.parallel
            return inputs.evaluation.run(
                moment, number, policy, actor.tokenizer, parallel, log, settings
            )

    save = partial(save_role, ppo, "policy", actor, best_dir)
    return Evaluations(evaluate, settings.evaluation.keep_best, save, log)
