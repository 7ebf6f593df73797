r"""Pre-train a language model on texts, from random weights or on from a checkpoint.

    python dataset/build.py pretrain --source texts/ --tokenizer_file T.json --save_dir shards
    torchrun --nproc_per_node 8 pretrain.py --config_file config.json --tokenizer_file T.json \
        --train_file shards --save_dir OUT
    torchrun --nproc_per_node 8 pretrain.py --ckpt_dir CKPT --train_file code:0.7,prose:0.3 \
        --valid_file held-out --max_steps 10000 --save_dir OUT

The train file is one or several folders of shards, whose documents are packed into rows of
--max_seq_len tokens. CKPT is a checkpoint for any degree, or a Hugging Face folder. OUT becomes
one for this run's degree; with LoRA, a merged one with the adapter beside.
"""

from functools import partial

from src.cli import run
from src.settings.pretraining import PretrainSettings


def main(settings: PretrainSettings) -> None:
    """Train, and measure perplexity on the way when there are shards to measure it on."""
    from src.checkpoint.load import load_model
    from src.dry_run import pretraining_plan
    from src.evaluation.training import Evaluations
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop
    from src.trainer.earlier import Earlier
    from src.trainer.fit import fit, prepare, rows_per_step
    from src.trainer.inputs import Places, PretrainInputs
    from src.trainer.optimizer import Optimizer
    from src.trainer.pretraining import PretrainingObjective
    from src.trainer.saving import Saving

    if settings.dry_run.dry_run:
        return pretraining_plan(settings)

    # Join the other ranks.
    run, plan, saving_plan = settings.run, settings.optimizer, settings.saving
    places = Places.of(saving_plan.log_dir, saving_plan.save_dir)
    degrees = run.model_parallel_size, run.timeout, run.deterministic, run.pipeline_parallel_size
    parallel = start(*degrees, run.context_parallel_size)

    # Read and check everything, and what an earlier run of this command left, before any work.
    inputs = agreed(lambda: PretrainInputs.read(settings, parallel))
    rows = rows_per_step(settings.batches, parallel.data_size)
    earlier = Earlier.find(settings, [saving_plan.save_dir], parallel, rows_per_step=rows)

    # Load, or draw, this rank's part of the model.
    dtype, quantize = pick_dtype(run.dtype, parallel.device), settings.lora.quantize
    how = run.seed, quantize, inputs.lora, run.zero, run.offload_params, run.stages_per_rank
    model = load_model(inputs.model.checkpoint, parallel, dtype, "lm", *how)

    with RunLog(places.logs, "pretrain", settings, parallel.rank) as log:
        inputs.model.announce(log)
        for note in inputs.notes:
            log.warning(note)
        stream = inputs.stream
        log.info(f"{stream.tokens:,} tokens in {stream.rows:,} rows; {parallel.described}")

        # What is trained, how, and what is looked at on the way.
        prepare(model, plan, run, parallel)
        optimizer = Optimizer.of(plan, model, parallel, run)
        objective = PretrainingObjective(stream, parallel.device, parallel.context, plan.max_steps)
        evaluations = Evaluations(
            partial(inputs.evaluate, model=model, parallel=parallel, log=log, settings=settings),
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
        fit(model, optimizer, objective, settings, parallel, log, evaluations, saving)
        inputs.model.save(model, parallel, saving_plan.save_dir)
        log.info(f"saved to {saving_plan.save_dir}")
        saving.finish()
    stop()


command = partial(run, main)

if __name__ == "__main__":
    command()
