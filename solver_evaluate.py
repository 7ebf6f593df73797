"""Measure a solver on a task: one greedy answer per question, graded by all of the task's public rules.

    torchrun --nproc_per_node 8 solver_evaluate.py --task GSM8K --ckpt_dir CKPT --log_dir LOGS --label_file test.json \
        --model_type llama-1-7b --max_batch_size 384
    python solver_evaluate.py --task GSM8K --label_file test.json --prediction_file preds.jsonl --log_dir LOGS

The second form grades texts that are there already ({"output": "..."} per row, in the label file's order), without a
model. LOGS gets results.json (each accuracy, truncated, unparsed, settings) and predictions.jsonl. An answer that cannot be
parsed counts as wrong.
"""

from pathlib import Path
from typing import Literal

from src.cli import run


def main(
    task: str,
    label_file: str,
    log_dir: str,
    ckpt_dir: str | None = None,
    prediction_file: str | None = None,
    model_type: str | None = None,
    tokenizer_file: str | None = None,
    config_file: str | None = None,
    adapter_dir: str | None = None,
    use_chat_template: bool = False,
    quantize: Literal["nf4", "int8"] | None = None,
    max_batch_size: int = 384,
    kv_cache_gb: float | None = None,
    max_seq_len: int = 1024,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    num_samples: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    seed: int = 0,
    model_parallel_size: int | None = None,
    timeout: float = 1800.0,
):
    """Generate (or read) the answers, grade them, write the results.

    Args:
        task: what to evaluate on: GSM8K.
        label_file: the task's rows: "instruction" and "label", as dataset/build.py writes them, or the official files'.
        log_dir: for results.json and predictions.jsonl.
        ckpt_dir: the solver: shards for any degree, or a Hugging Face folder.
        prediction_file: texts to grade instead, {"output"} per row.
        model_type: a name such as llama-2-7b to check the sizes against.
        tokenizer_file: found in ckpt_dir when not given.
        config_file: params.json or config.json; found in ckpt_dir when not given.
        adapter_dir: a LoRA adapter in PEFT's format to add to the weights.
        use_chat_template: write each instruction as a user's turn, by the checkpoint's chat template or the family's.
        quantize: keep the linear layers' weights in 4 or 8 bits.
        max_batch_size: sequences generated at a time, at most.
        kv_cache_gb: memory for keys and values per rank; half the free memory when not given.
        max_seq_len: prompt and answer together.
        max_new_tokens: of one answer.
        min_new_tokens: no stop token before so many.
        num_samples: answers per question: pass@k and maj@n beside the accuracy of all.
        num_beams: beam search with so many beams, when above 1; then nothing is sampled.
        length_penalty: a beam's score is its log-probability over its length to this power.
        temperature: 0 takes the likeliest token.
        top_p: sample from the smallest set of tokens with this much probability.
        top_k: sample from this many likeliest tokens; 0 is all.
        min_p: leave out tokens less likely than this share of the likeliest.
        repetition_penalty: divides (or, if negative, multiplies) the logits of tokens that are there already.
        dtype: of weights and activations; bf16 on a GPU and fp32 on the CPU when not given.
        seed: fixes the samples when temperature is above 0.
        model_parallel_size: ranks per model; all of them when not given.
        timeout: seconds that a collective may take before the run is given up.
    """
    settings = dict(locals())
    from src.checkpoint.load import load_model
    from src.data.rows import STRING, read_rows
    from src.errors import UserError
    from src.evaluation.solver import evaluate_solver, graded, headline, write_results
    from src.generation.beam import engine_of
    from src.generation.journal import Journal
    from src.generation.sampling import Sampling
    from src.inputs import (
        check_beams,
        check_flags,
        check_log_dir,
        open_model,
        read_evaluation,
        within,
    )
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop

    check_flags(settings)
    check_beams(settings)
    sampling = Sampling(
        max_new_tokens, temperature, top_p, top_k, seed, min_p, repetition_penalty, min_new_tokens
    )
    if (ckpt_dir is None) == (prediction_file is None):
        raise UserError(
            "give --ckpt_dir to generate answers, or --prediction_file to grade existing ones: one of the two"
        )
    parallel = start(model_parallel_size, timeout)

    def read_inputs():
        check_log_dir(log_dir, ckpt_dir)
        data = read_evaluation(task, label_file)
        if ckpt_dir is not None:
            opened = open_model(
                ckpt_dir,
                parallel,
                tokenizer_file,
                config_file,
                model_type,
                "lm",
                adapter_dir,
                use_chat_template,
            )
            lengths = [len(opened.tokenizer.prompt_ids(text)) + 1 for text in data.instructions]
            warning = within(
                lengths, max_seq_len, False, f"prompts of {label_file}, with one token more,"
            )[1]
            return (
                data,
                opened,
                None,
                warning,
                Journal(Path(log_dir) / "predictions.jsonl", settings, parallel),
            )
        texts = [row["output"] for row in read_rows(prediction_file, {"output": STRING})]
        if len(texts) != len(data.rows) * num_samples:
            raise UserError(
                f"{prediction_file} has {len(texts)} rows and {label_file} {len(data.rows)}: {num_samples} for each (--num_samples) "
                "are needed"
            )
        return data, None, texts, None, None

    data, opened, texts, warning, journal = agreed(read_inputs)
    if opened is not None:
        model = load_model(
            opened.checkpoint, parallel, pick_dtype(dtype, parallel.device), "lm", seed, quantize
        )
    with RunLog(log_dir, "solver_evaluate", settings, parallel.rank) as log:
        if warning:
            log.warning(f"{warning}: they count as wrong")
        if opened is None:
            summary, predictions = graded(
                data.task, data.instructions, data.golds, texts, None, num_samples
            )
        else:
            engine = engine_of(
                model, parallel, max_batch_size, max_seq_len, kv_cache_gb, num_beams, length_penalty
            )
            summary, predictions = evaluate_solver(
                engine,
                opened.tokenizer,
                data.task,
                data.instructions,
                data.golds,
                sampling,
                log,
                num_samples,
                journal,
            )
        if parallel.is_main:
            write_results(log_dir, summary, predictions, settings)
            if opened is not None:
                journal.remove()
        log.info(headline(summary))
    stop()


if __name__ == "__main__":
    run(main)
