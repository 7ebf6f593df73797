r"""Train a solver (policy) on preferences: DPO and its family, offline or online.

    torchrun --nproc_per_node 8 preference_train.py --ckpt_dir CKPT --save_dir OUT \
        --train_file pairs.json --loss dpo --beta 0.1
    torchrun --nproc_per_node 8 preference_train.py --ckpt_dir CKPT --save_dir OUT \
        --train_file prompts.json --online --reward rule --task GSM8K --samples_per_prompt 4

Rows of the train file: {"instruction": "...", "chosen": "..." or [...], "rejected": "..." or
[...]}, or {"instruction": "...", "ranked": ["best", ..., "worst"]}; for --loss kto also
{"instruction": "...", "output": "...", "label": true or false}; with --online prompts as PPO takes
them. CKPT is the policy to start from, and the reference. OUT becomes shards for this run's degree;
with LoRA, merged ones with the adapter beside. All of these may be conversations, too:
docs/conversations.md.
"""

from functools import partial

from src.cli import run
from src.settings.preference import PreferenceTrainSettings


def main(settings: PreferenceTrainSettings) -> None:
    """Train, and evaluate before the first and after every epoch when there is a label file."""
    from src.checkpoint.load import load_model
    from src.dry_run import preference_plan
    from src.evaluation.training import Evaluations
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop
    from src.trainer.earlier import Earlier
    from src.trainer.fit import fit, prepare, rows_per_step
    from src.trainer.inputs import Places, PreferenceInputs
    from src.trainer.optimizer import Optimizer
    from src.trainer.preference_setup import make_objective
    from src.trainer.saving import Saving

    if settings.dry_run.dry_run:
        return preference_plan(settings)

    # Join the other ranks.
    run, plan, saving_plan = settings.run, settings.optimizer, settings.saving
    places = Places.of(saving_plan.log_dir, saving_plan.save_dir)
    degrees = run.model_parallel_size, run.timeout, run.deterministic, run.pipeline_parallel_size
    parallel = start(*degrees, run.context_parallel_size)

    # Read and check everything, and what an earlier run of this command left, before any work.
    inputs = agreed(lambda: PreferenceInputs.read(settings, parallel))
    rows = rows_per_step(settings.batches, parallel.data_size)
    earlier = Earlier.find(settings, [saving_plan.save_dir], parallel, rows_per_step=rows)

    # Load this rank's part of the policy.
    dtype, quantize = pick_dtype(run.dtype, parallel.device), settings.lora.quantize
    start_from = inputs.model.checkpoint
    how = run.seed, quantize, inputs.lora, run.zero, run.offload_params, run.stages_per_rank
    model = load_model(start_from, parallel, dtype, "lm", *how)

    with RunLog(places.logs, "preference_train", settings, parallel.rank) as log:
        inputs.model.announce(log)
        for note in inputs.notes:
            log.warning(note)
        log.info(f"{inputs.mixture.n_rows} rows; {parallel.described}")

        # What is trained, how, and what is minimised, beside what reference; what is looked at.
        prepare(model, plan, run, parallel)
        objective = make_objective(settings, inputs, model, dtype, parallel, log)
        optimizer = Optimizer.of(plan, model, parallel, run)
        evaluations = Evaluations(
            partial(
                inputs.evaluation.run,
                model=model,
                tokenizer=inputs.model.tokenizer,
                parallel=parallel,
                log=log,
                settings=settings,
            ),
            settings.evaluation.keep_best,
            partial(inputs.model.save, model, parallel, places.best),
            log,
        )
        saving = Saving(
            earlier,
            saving_plan,
            {"model": (model, optimizer)},
            parallel,
            log,
            {"best": evaluations.part},
        )

        # Train, from where an earlier run stopped, and save.
        beside = evaluations, saving, inputs.mixture
        fit(model, optimizer, objective, settings, parallel, log, *beside)
        inputs.model.save(model, parallel, saving_plan.save_dir)
        log.info(f"saved to {saving_plan.save_dir}")
        saving.finish()
    stop()


command = partial(run, main)

if __name__ == "__main__":
    command()
