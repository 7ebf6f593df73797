r"""Measure a verifier on pairs, or score outputs with it.

    torchrun --nproc_per_node 8 verifier_evaluate.py --ckpt_dir CKPT \
        --label_file verifier_test.json --log_dir LOGS
    torchrun --nproc_per_node 8 verifier_evaluate.py --ckpt_dir CKPT --input_file rows.jsonl \
        --output_file scores.jsonl

Rows of the label file: {"instruction", "chosen", "rejected"}; LOGS gets results.json (the share of
pairs in which the chosen side scores higher) and predictions.jsonl. Rows of the input file:
{"instruction", "output"}; the output file gets {"index", "score"} per row, in the input's order,
with --step_separator also "scores", one for each step.
"""

from functools import partial

from src.cli import run
from src.settings.scripts import VerifierEvaluateSettings


def main(settings: VerifierEvaluateSettings) -> None:
    """Score both sides of every pair, or every row."""
    from src.checkpoint.load import load_model
    from src.data.rows import write_jsonl
    from src.evaluation.inputs import VerifierEvaluationInputs
    from src.evaluation.solver import write_results
    from src.evaluation.verifier import evaluate_pairs, score_places
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop
    from src.settings.declaration import flat

    # Join the other ranks.
    run, rows, size = settings.run, settings.rows, settings.batches.max_batch_size
    weights = settings.weights
    parallel = start(run.model_parallel_size, run.timeout, run.deterministic)

    # Read and check everything, before any work.
    inputs = agreed(lambda: VerifierEvaluationInputs.read(settings, parallel))

    # Load this rank's part of the model.
    dtype, source = pick_dtype(run.dtype, parallel.device), inputs.model.checkpoint
    how, streamed = (run.seed, weights.quantize), weights.offload_params
    model = load_model(source, parallel, dtype, "score", *how, streamed=streamed)

    with RunLog(rows.log_dir, "verifier_evaluate", settings, parallel.rank) as log:
        inputs.model.announce(log)
        for note in inputs.notes:
            log.warning(note)

        # Measure on pairs.
        if rows.log_dir is not None:
            summary, lines = evaluate_pairs(model, parallel, inputs.pairs, size, log)
            if parallel.is_main:
                write_results(rows.log_dir, summary, lines, flat(settings))
            log.info(f"pair accuracy {100 * summary['accuracy']:.1f} % on {summary['pairs']} pairs")

        # Score rows.
        if rows.output_file is not None:
            mean, std = inputs.moments or (0.0, 1.0)
            if inputs.moments:
                log.info(
                    f"scores are centred by {mean:.4f} and divided by {std:.4f}, as stored with "
                    "the verifier"
                )
            ends = [[len(sequence.tokens) - 1] for sequence in inputs.sequences]
            places = inputs.places or ends
            scores = score_places(model, parallel, inputs.sequences, places, size, log)
            scores = [[(x - mean) / std for x in row] for row in scores]
            if parallel.is_main:
                lines = [{"index": i, "score": row[-1]} for i, row in enumerate(scores)]
                if inputs.places:
                    lines = [{**line, "scores": row} for line, row in zip(lines, scores)]
                write_jsonl(rows.output_file, lines)
            log.info(f"wrote {len(scores)} scores to {rows.output_file}")
    stop()


command = partial(run, main)

if __name__ == "__main__":
    command()
