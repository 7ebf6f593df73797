r"""Train a student on a teacher's distributions: distillation, on given outputs or its own.

    torchrun --nproc_per_node 8 distill_train.py --ckpt_dir STUDENT --teacher_ckpt_dir TEACHER \
        --save_dir OUT --train_file train.json --on_policy 0.5 --divergence js
    torchrun --nproc_per_node 8 distill_train.py --ckpt_dir STUDENT --save_dir OUT \
        --train_file scored.jsonl       # of solver_score.py --top_k_logprobs 64 with the teacher

Rows of the train file: {"instruction": "...", "output": "..." or ["...", "..."]}; with --on_policy
1 the instruction alone. Conversations, too, as solver_train.py takes them. TEACHER is a folder of
shards or of Hugging Face's, with STUDENT's vocabulary. OUT becomes shards for this run's degree;
with LoRA, merged ones with the adapter beside.
"""

from functools import partial

from src.cli import run
from src.settings.distillation import DistillTrainSettings


def main(settings: DistillTrainSettings) -> None:
    """Train, and evaluate before the first and after every epoch when there is a label file."""
    from src.checkpoint.load import load_model
    from src.dry_run import distillation_plan
    from src.evaluation.training import Evaluations
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop
    from src.trainer.distillation_setup import make_objective
    from src.trainer.earlier import Earlier
    from src.trainer.fit import fit, prepare, rows_per_step
    from src.trainer.inputs import DistillationInputs, Places
    from src.trainer.optimizer import Optimizer
    from src.trainer.saving import Saving

    if settings.dry_run.dry_run:
        return distillation_plan(settings)

    # Join the other ranks.
    run, plan, saving_plan = settings.run, settings.optimizer, settings.saving
    places = Places.of(saving_plan.log_dir, saving_plan.save_dir)
    degrees = run.model_parallel_size, run.timeout, run.deterministic, run.pipeline_parallel_size
    parallel = start(*degrees, run.context_parallel_size)

    # Read and check everything, and what an earlier run of this command left, before any work.
    inputs = agreed(lambda: DistillationInputs.read(settings, parallel))
    rows = rows_per_step(settings.batches, parallel.data_size)
    earlier = Earlier.find(settings, [saving_plan.save_dir], parallel, rows_per_step=rows)

    # Load this rank's part of the student.
    dtype, quantize = pick_dtype(run.dtype, parallel.device), settings.lora.quantize
    start_from = inputs.model.checkpoint
    how = run.seed, quantize, inputs.lora, run.zero, run.offload_params, run.stages_per_rank
    model = load_model(start_from, parallel, dtype, "lm", *how)

    with RunLog(places.logs, "distill_train", settings, parallel.rank) as log:
        inputs.model.announce(log)
        for note in inputs.notes:
            log.warning(note)
        log.info(f"{inputs.mixture.n_rows} rows; {parallel.described}")

        # What is minimised, by which teacher; what is trained, how, and what is looked at.
        objective = make_objective(settings, inputs, model, dtype, parallel)
        prepare(model, plan, run, parallel)
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
