r"""Train a verifier (reward model): on pairs of outputs, on rankings, or on scores or labels.

    torchrun --nproc_per_node 8 verifier_train.py --ckpt_dir CKPT --save_dir OUT \
        --train_file train.json --model_type llama-1-7b --max_batch_size 6

Rows of the train file: {"instruction": "...", "chosen": "..." or [...], "rejected": "..." or
[...]}, or {"instruction": "...", "ranked": ["best", ..., "worst"], "scores": [...]}, where equal
scores are ties. With --objective pointwise {"instruction": "...", "output": "...", "score": 1.5},
with classification "label": true or false; with --step_separator a list of "scores" or "labels",
one for each step of the output. Conversations, too (docs/conversations.md). CKPT is a solver's
checkpoint (the scalar head starts at random) or a verifier's. OUT becomes shards for this run's
degree.
"""

from functools import partial

from src.cli import run
from src.settings.scripts import VerifierTrainSettings


def main(settings: VerifierTrainSettings) -> None:
    """Train, and evaluate before the first and after every epoch when there is a label file."""
    from src.checkpoint.load import load_model
    from src.dry_run import verifier_plan
    from src.evaluation.training import Evaluations
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop
    from src.trainer.earlier import Earlier
    from src.trainer.fit import fit, prepare, rows_per_step
    from src.trainer.inputs import Places, VerifierInputs
    from src.trainer.optimizer import Optimizer
    from src.trainer.saving import Saving
    from src.trainer.verifier import objective_of

    if settings.dry_run.dry_run:
        return verifier_plan(settings)

    # Join the other ranks.
    run, plan, saving_plan = settings.run, settings.optimizer, settings.saving
    places = Places.of(saving_plan.log_dir, saving_plan.save_dir)
    degrees = run.model_parallel_size, run.timeout, run.deterministic, run.pipeline_parallel_size
    parallel = start(*degrees, run.context_parallel_size)

    # Read and check everything, and what an earlier run of this command left, before any work.
    inputs = agreed(lambda: VerifierInputs.read(settings, parallel))
    rows = rows_per_step(settings.batches, parallel.data_size)
    earlier = Earlier.find(settings, [saving_plan.save_dir], parallel, rows_per_step=rows)

    # Load this rank's part of the model, with a scalar head.
    dtype, quantize = pick_dtype(run.dtype, parallel.device), settings.lora.quantize
    start_from = inputs.model.checkpoint
    how = run.seed, quantize, inputs.lora, run.zero, run.offload_params, run.stages_per_rank
    model = load_model(start_from, parallel, dtype, "score", *how)

    with RunLog(places.logs, "verifier_train", settings, parallel.rank) as log:
        inputs.model.announce(log)
        for note in inputs.notes:
            log.warning(note)
        log.info(f"{inputs.mixture.n_rows} rows; {parallel.described}")

        # What is trained, how, and what is looked at on the way.
        prepare(model, plan, run, parallel)
        optimizer = Optimizer.of(plan, model, parallel, run)
        kind = settings.objective.objective
        objective = objective_of(inputs.rows, kind, model, parallel)
        save = partial(inputs.save, model, parallel, settings.evaluation, log)
        evaluations = Evaluations(
            partial(
                inputs.evaluation.run,
                model=model,
                parallel=parallel,
                log=log,
                settings=settings,
                objective=settings.objective.objective,
            ),
            settings.evaluation.keep_best,
            partial(save, places.best),
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
        save(saving_plan.save_dir)
        log.info(f"saved to {saving_plan.save_dir}")
        saving.finish()
    stop()


command = partial(run, main)

if __name__ == "__main__":
    command()
