r"""Log-probabilities of given outputs, token by token.

    torchrun --nproc_per_node 8 solver_score.py --ckpt_dir CKPT --input_file rows.jsonl \
        --output_file out.jsonl

Rows in: {"instruction": "...", "output": "..."}. Rows out, in the input's order:
{"prompt_tokens": [...], "tokens": [...], "logprobs": [...], "sum": x}; tokens are the output's ids,
EOS included, and logprobs natural logarithms. With --top_k_logprobs also {"top_tokens",
"top_logprobs"}, a list for each token, "vocabulary", a digest, and "temperature": what
distill_train.py takes.
"""

from functools import partial

from src.cli import run
from src.settings.scripts import SolverScoreSettings


def main(settings: SolverScoreSettings) -> None:
    """Write one line per row."""
    import torch

    from src.checkpoint.load import load_model
    from src.data.encoding import scored_sequences
    from src.data.rows import write_jsonl
    from src.evaluation.logprobs import logprob_lines, score_responses
    from src.inputs import check_writable, open_model
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop

    # Join the other ranks.
    run, rows, batches, weights = settings.run, settings.rows, settings.batches, settings.weights
    parallel = start(run.model_parallel_size, run.timeout, run.deterministic)

    # Read and check everything, before any work.
    agreed(lambda: check_writable(rows.output_file, ".jsonl", rows.input_file))
    source = agreed(lambda: open_model(settings.model, parallel, "lm"))
    sequences, notes = agreed(
        lambda: scored_sequences(rows.input_file, source.tokenizer, batches.max_seq_len, True)
    )

    with RunLog(None, "solver_score", settings, parallel.rank) as log, torch.no_grad():
        source.announce(log)
        for note in notes:
            log.warning(note)

        # Load this rank's part of the model.
        dtype, checkpoint = pick_dtype(run.dtype, parallel.device), source.checkpoint
        how, streamed = (run.seed, weights.quantize), weights.offload_params
        model = load_model(checkpoint, parallel, dtype, "lm", *how, streamed=streamed).eval()

        # Score, each data-parallel rank its share, and write everything in order.
        temperature, size = settings.softmax.temperature, batches.max_batch_size
        k = min(rows.top_k_logprobs, source.tokenizer.vocab_size)
        scored = score_responses(model, parallel, sequences, temperature, size, log, k)
        if parallel.is_main:
            lines = logprob_lines(sequences, scored, source.tokenizer, temperature)
            write_jsonl(rows.output_file, lines)
        log.info(f"wrote {len(sequences)} rows to {rows.output_file}")
    stop()


command = partial(run, main)

if __name__ == "__main__":
    command()
