r"""Generate outputs for a file of instructions.

    torchrun --nproc_per_node 8 solver_generate.py --ckpt_dir CKPT --input_file rows.jsonl \
        --output_file out.jsonl

Rows in: {"instruction": "..."}. Rows out, in the input's order, --num_samples for each: {"index",
"instruction", "output", "tokens", "logprobs", "stop_reason"}; index counts the input's rows from 0.
With --best_of rule, verifier or file only the best of a row's samples, or all right ones (--keep),
with a "score": what solver_train.py takes.
"""

from functools import partial

from src.cli import run
from src.settings.scripts import SolverGenerateSettings


def main(settings: SolverGenerateSettings) -> None:
    """Write one line per sample."""
    from src.checkpoint.load import load_model
    from src.data.rows import write_jsonl
    from src.dry_run import generation_plan
    from src.generation.engine import Stop
    from src.generation.from_settings import engine_of, sampling_of
    from src.generation.journal import generate_all
    from src.generation.responses import GenerationInputs, kept
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop

    if settings.dry_run.dry_run:
        return generation_plan(settings)

    # Join the other ranks.
    run, rows, weights = settings.run, settings.rows, settings.weights
    sampling = sampling_of(settings.generation, run.seed)
    parallel = start(run.model_parallel_size, run.timeout, run.deterministic)

    # Read and check everything, and what an earlier run of this command left, before any work.
    inputs = agreed(lambda: GenerationInputs.read(settings, parallel))
    tokenizer = inputs.model.tokenizer

    with RunLog(None, "solver_generate", settings, parallel.rank) as log:
        inputs.model.announce(log)
        for note in inputs.notes:
            log.warning(note)

        # Load this rank's part of the model.
        dtype, source = pick_dtype(run.dtype, parallel.device), inputs.model.checkpoint
        how, streamed = (run.seed, weights.quantize), weights.offload_params
        model = load_model(source, parallel, dtype, "lm", *how, streamed=streamed).eval()

        # Generate; completions are on disk as they finish.
        engine = engine_of(model, parallel, settings.batches, settings.generation)
        strings = tuple(settings.generation.stop_strings or ())
        stops = Stop(tokenizer.stop_ids, strings, tokenizer.decode)
        completions = generate_all(
            engine, inputs.prompts, sampling, stops, log, "generating", inputs.journal
        )

        # Score the samples, if the best are to be kept.
        scores = None
        if inputs.judge is not None:
            del engine, model  # a verifier takes their memory
            judge = inputs.judge.load(parallel, dtype, streamed)
            scores = judge(inputs.asked, inputs.cut(completions, strings))
        lines = inputs.lines(completions, strings, scores)
        if scores is not None:
            lines = kept(lines, settings.best_of)
            none = len({index for index, _ in inputs.rows} - {line["index"] for line in lines})
            log.info(f"{len(lines)} outputs are kept; {none} instructions have none")

        # Write everything in order.
        if parallel.is_main:
            write_jsonl(rows.output_file, lines)
            inputs.journal.remove()
        log.info(f"wrote {len(lines)} outputs to {rows.output_file}")
    stop()


command = partial(run, main)

if __name__ == "__main__":
    command()
