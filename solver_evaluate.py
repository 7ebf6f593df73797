r"""Measure a solver on a task: one greedy answer per question, graded by all of the task's rules.

    torchrun --nproc_per_node 8 solver_evaluate.py --task GSM8K --ckpt_dir CKPT --log_dir LOGS \
        --label_file test.json --model_type llama-1-7b --max_batch_size 384
    python solver_evaluate.py --task GSM8K --label_file test.json --prediction_file preds.jsonl \
        --log_dir LOGS

The second form grades texts that are there already ({"output": "..."} per row, in the label file's
order), without a model; both read and grade them the same way (docs/evaluation.md). LOGS gets
results.json (each accuracy, truncated, unparsed, settings) and predictions.jsonl. An answer that
cannot be parsed counts as wrong. Tasks: GSM8K, MATH.
"""

from functools import partial

from src.cli import run
from src.settings.scripts import SolverEvaluateSettings


def main(settings: SolverEvaluateSettings) -> None:
    """Generate (or read) the answers, grade them, write the results."""
    from src.checkpoint.load import load_model
    from src.dry_run import generation_plan
    from src.evaluation.inputs import SolverEvaluationInputs
    from src.evaluation.solver import evaluate_solver, graded, headline, write_results
    from src.generation.from_settings import engine_of, sampling_of
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop
    from src.settings.declaration import flat

    if settings.dry_run.dry_run:
        return generation_plan(settings)

    # Join the other ranks.
    run, weights, log_dir = settings.run, settings.weights, settings.rows.log_dir
    decoding, sampling = settings.generation, sampling_of(settings.generation, run.seed)
    stop_strings = tuple(decoding.stop_strings or ())
    parallel = start(run.model_parallel_size, run.timeout, run.deterministic)

    # Read and check everything, and what an earlier run of this command left, before any work.
    inputs = agreed(lambda: SolverEvaluationInputs.read(settings, parallel))
    data = inputs.data

    # Load this rank's part of the model, if there is one.
    if inputs.model is not None:
        dtype, source = pick_dtype(run.dtype, parallel.device), inputs.model.checkpoint
        how, streamed = (run.seed, weights.quantize), weights.offload_params
        model = load_model(source, parallel, dtype, "lm", *how, streamed=streamed)

    with RunLog(log_dir, "solver_evaluate", settings, parallel.rank) as log:
        if inputs.model is not None:
            inputs.model.announce(log)
        for note in inputs.notes:
            log.warning(note)

        # Grade texts that are there, or answers as the model gives them.
        rows = data.task, data.instructions, data.golds
        if inputs.model is None:
            summary, predictions = graded(
                *rows,
                inputs.texts,
                inputs.truncated,
                decoding.num_samples,
                stop_strings,
                parallel,
            )
        else:
            engine = engine_of(model, parallel, settings.batches, decoding)
            summary, predictions = evaluate_solver(
                engine,
                inputs.model.tokenizer,
                *rows,
                sampling,
                log,
                decoding.num_samples,
                inputs.journal,
                stop_strings,
            )

        # Write the results.
        if parallel.is_main:
            write_results(log_dir, summary, predictions, flat(settings))
            if inputs.journal is not None:
                inputs.journal.remove()
        log.info(headline(summary))
    stop()


command = partial(run, main)

if __name__ == "__main__":
    command()
