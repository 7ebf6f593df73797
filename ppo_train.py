r"""Policy optimisation of a solver from rewards: PPO with a value model, or group baselines.

    torchrun --nproc_per_node 8 ppo_train.py --actor_ckpt_dir SOLVER --actor_save_dir OUT \
        --critic_ckpt_dir VERIFIER --critic_save_dir OUT2 --reward_model_ckpt_dir VERIFIER \
        --train_file train.json --max_batch_size 6 --max_buffer_size 96
    torchrun --nproc_per_node 8 ppo_train.py --actor_ckpt_dir SOLVER --actor_save_dir OUT \
        --train_file train.json --advantage grpo --samples_per_prompt 8 --reward rule --task GSM8K

Rows of the train file: {"instruction": "...", "label": "..."}; the label is needed for the rule. Or
a conversation up to a question, {"messages": [...], "label": "..."} (docs/conversations.md).
Tensor- and data-parallel. Nothing is read from disk between the phases: the roles stay in memory,
on the device or (--offload) the host's. What the code must satisfy, every knob, and the meaning of
every logged number: docs/ppo.md.
"""

from functools import partial

from src.cli import run
from src.settings.ppo import PPOTrainSettings


def main(settings: PPOTrainSettings) -> None:
    """Train, and evaluate before the first and after every epoch when there is a label file."""
    from src.dry_run import ppo_plan
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop
    from src.ppo.assembly import evaluations_of, make_ppo, save_role
    from src.ppo.fit import fit
    from src.ppo.inputs import PPOInputs
    from src.ppo.layouts import Layouts
    from src.ppo.setup import load_roles
    from src.trainer.earlier import Earlier
    from src.trainer.inputs import Places
    from src.trainer.saving import Saving

    if settings.dry_run.dry_run:
        return ppo_plan(settings)

    # Join the other ranks.
    roles, plan = settings.roles, settings.optimizer
    places = Places.of(settings.saving.log_dir, roles.actor_save_dir)
    run, actor_train = settings.run, settings.layouts.actor_train
    degrees = run.model_parallel_size, run.timeout, run.deterministic, run.pipeline_parallel_size
    parallel = start(*degrees, layout=actor_train)
    size = settings.rollouts.max_buffer_size
    layouts = Layouts.of(settings.layouts, run, size, parallel.world_size)
    parallel = parallel.laid_out(layouts.actor_train)
    dtype = pick_dtype(settings.run.dtype, parallel.device)

    # Read and check everything, and what an earlier run of this command left, before any work.
    inputs = agreed(lambda: PPOInputs.read(settings, parallel, dtype))
    save_dirs = [roles.actor_save_dir, *filter(None, [roles.critic_save_dir])]
    earlier = Earlier.find(settings, save_dirs, parallel)

    # Load this rank's part of each role.
    has_reference = inputs.has_reference(settings)
    stage = load_roles(inputs.roles, settings, layouts, parallel, dtype, has_reference)

    with RunLog(places.logs, "ppo_train", settings, parallel.rank) as log:
        inputs.announce(settings, layouts, log)

        # The engine, the rewards and what goes on from an earlier run: one object, PPO.
        ppo = make_ppo(settings, inputs, layouts, stage, parallel, log)
        evaluations = evaluations_of(ppo, settings, inputs, places.best, log)
        saving = Saving(
            earlier,
            settings.saving,
            stage.trained(),
            parallel,
            log,
            {"best": evaluations.part, **ppo.state.parts()},
            ppo.state.tensors(),
            partial(stage.at_work, training=True),
        )

        # Train, from where an earlier run stopped, and save.
        seed, eval_every = settings.run.seed, settings.evaluation.eval_every
        beside = evaluations, saving, inputs.mixture
        fit(ppo, inputs.prompts, plan, seed, eval_every, log, *beside)
        save_role(ppo, "policy", inputs.roles.actor, roles.actor_save_dir)
        log.info(f"saved the policy to {roles.actor_save_dir}")
        if inputs.roles.critic and roles.critic_save_dir:
            save_role(ppo, "value", inputs.roles.critic, roles.critic_save_dir)
            log.info(f"saved the value model to {roles.critic_save_dir}")
        saving.finish()
    stop()


command = partial(run, main)

if __name__ == "__main__":
    command()
