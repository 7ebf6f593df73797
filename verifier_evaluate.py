"""Measure a verifier on pairs, or score outputs with it.

    torchrun --nproc_per_node 8 verifier_evaluate.py --ckpt_dir CKPT --label_file verifier_test.json --log_dir LOGS
    torchrun --nproc_per_node 8 verifier_evaluate.py --ckpt_dir CKPT --input_file rows.jsonl --output_file scores.jsonl

Rows of the label file: {"instruction", "chosen", "rejected"}; LOGS gets results.json (the share of pairs in which the
chosen side scores higher) and predictions.jsonl. Rows of the input file: {"instruction", "output"}; the output file gets
{"index", "score"} per row, in the input's order.
"""

from typing import Literal

from src.cli import run


def main(
    ckpt_dir: str,
    label_file: str | None = None,
    log_dir: str | None = None,
    input_file: str | None = None,
    output_file: str | None = None,
    model_type: str | None = None,
    tokenizer_file: str | None = None,
    config_file: str | None = None,
    adapter_dir: str | None = None,
    use_chat_template: bool = False,
    quantize: Literal["nf4", "int8"] | None = None,
    max_batch_size: int = 64,
    max_seq_len: int = 1024,
    strict_length: bool = False,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    seed: int = 0,
    model_parallel_size: int | None = None,
    timeout: float = 1800.0,
):
    """Score both sides of every pair, or every row.

    Args:
        ckpt_dir: the verifier: shards for any degree, or a Hugging Face sequence classifier.
        label_file: pairs to measure the accuracy on; needs --log_dir.
        log_dir: for results.json and predictions.jsonl.
        input_file: rows to score; needs --output_file.
        output_file: .jsonl to write.
        model_type: a name such as llama-2-7b to check the sizes against.
        tokenizer_file: found in ckpt_dir when not given.
        config_file: params.json or config.json; found in ckpt_dir when not given.
        adapter_dir: a LoRA adapter in PEFT's format to add to the weights.
        use_chat_template: write each instruction as a user's turn, by the checkpoint's chat template or the family's.
        quantize: keep the linear layers' weights in 4 or 8 bits.
        max_batch_size: sequences in one forward.
        max_seq_len: pairs with longer sequences are left out and counted; longer rows of --input_file are refused.
        strict_length: refuse such pairs too.
        dtype: of weights and activations; bf16 on a GPU and fp32 on the CPU when not given.
        seed: taken by every script; nothing is random here.
        model_parallel_size: ranks per model; all of them when not given.
        timeout: seconds that a collective may take before the run is given up.
    """
    settings = dict(locals())
    from src.checkpoint.load import load_model
    from src.checkpoint.save import read_score_moments
    from src.data.rows import TEXT, read_rows, write_jsonl
    from src.errors import UserError
    from src.evaluation.solver import write_results
    from src.evaluation.verifier import evaluate_pairs, score_all
    from src.inputs import (
        check_flags,
        check_log_dir,
        check_writable,
        comparisons,
        encode,
        open_model,
        within,
    )
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop

    check_flags(settings)
    measure, score = (label_file, log_dir), (input_file, output_file)
    if (None in measure) == (None in score) or any(
        None in pair and pair != (None, None) for pair in (measure, score)
    ):
        raise UserError(
            "give --label_file with --log_dir to measure, or --input_file with --output_file to score"
        )
    parallel = start(model_parallel_size, timeout)

    def read_inputs():
        opened = open_model(
            ckpt_dir,
            parallel,
            tokenizer_file,
            config_file,
            model_type,
            "score",
            adapter_dir,
            use_chat_template,
        )
        if label_file is not None:
            check_log_dir(log_dir, ckpt_dir)
            return opened, *comparisons(label_file, opened.tokenizer, max_seq_len, strict_length)
        check_writable(output_file, ".jsonl", input_file)
        rows = read_rows(input_file, {"instruction": TEXT, "output": TEXT})
        sequences = [encode(opened.tokenizer, row["instruction"], row["output"]) for row in rows]
        return (
            opened,
            sequences,
            within([len(s.tokens) for s in sequences], max_seq_len, True, f"rows of {input_file}")[
                1
            ],
        )

    opened, items, warning = agreed(read_inputs)
    moments = agreed(lambda: read_score_moments(opened.checkpoint.folder))
    model = load_model(
        opened.checkpoint, parallel, pick_dtype(dtype, parallel.device), "score", seed, quantize
    )
    with RunLog(log_dir, "verifier_evaluate", settings, parallel.rank) as log:
        if warning:
            log.warning(f"{warning} and are left out")
        if label_file is not None:
            summary, rows = evaluate_pairs(model, parallel, items, max_batch_size, log)
            if parallel.is_main:
                write_results(log_dir, summary, rows, settings)
            log.info(f"pair accuracy {100 * summary['accuracy']:.1f} % on {summary['pairs']} pairs")
        else:
            scores = score_all(model, parallel, items, max_batch_size, log)
            if moments:
                log.info(
                    f"scores are centred by {moments[0]:.4f} and divided by {moments[1]:.4f}, as stored with the verifier"
                )
                scores = (scores - moments[0]) / moments[1]
            scores = scores.tolist()
            if parallel.is_main:
                write_jsonl(output_file, [{"index": i, "score": x} for i, x in enumerate(scores)])
            log.info(f"wrote {len(scores)} scores to {output_file}")
    stop()


if __name__ == "__main__":
    run(main)
