"""Generate outputs for a file of instructions.

    torchrun --nproc_per_node 8 solver_generate.py --ckpt_dir CKPT --input_file rows.jsonl --output_file out.jsonl

Rows in: {"instruction": "..."}; anything else in a row is ignored. Rows out, in the input's order, --num_samples for each:
{"index", "instruction", "output", "tokens", "logprobs", "stop_reason"}; index counts the input's rows from 0.
"""

from pathlib import Path
from typing import Literal

from src.cli import run


def main(
    ckpt_dir: str,
    input_file: str,
    output_file: str,
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
    stop_strings: list[str] | None = None,
    num_samples: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    max_rows: int | None = None,
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
    """Write one line per sample.

    Args:
        ckpt_dir: the solver: shards for any degree, or a Hugging Face folder.
        input_file: .json or .jsonl rows with "instruction".
        output_file: .jsonl to write.
        model_type: a name such as llama-2-7b to check the sizes against.
        tokenizer_file: found in ckpt_dir when not given.
        config_file: params.json or config.json; found in ckpt_dir when not given.
        adapter_dir: a LoRA adapter in PEFT's format to add to the weights.
        use_chat_template: write each instruction as a user's turn, by the checkpoint's chat template or the family's.
        quantize: keep the linear layers' weights in 4 or 8 bits.
        max_batch_size: sequences generated at a time, at most.
        kv_cache_gb: memory for keys and values per rank; half the free memory when not given.
        max_seq_len: prompt and output together.
        max_new_tokens: of one output.
        min_new_tokens: no stop token before so many.
        stop_strings: strings that end an output, which is cut before them.
        num_samples: outputs per instruction; they differ when temperature is above 0.
        num_beams: beam search with so many beams, when above 1; then nothing is sampled.
        length_penalty: a beam's score is its log-probability over its length to this power.
        max_rows: only the first rows of the input.
        temperature: 0 takes the likeliest token.
        top_p: sample from the smallest set of tokens with this much probability.
        top_k: sample from this many likeliest tokens; 0 is all.
        min_p: leave out tokens less likely than this share of the likeliest.
        repetition_penalty: divides (or, if negative, multiplies) the logits of tokens that are there already.
        dtype: of weights and activations; bf16 on a GPU and fp32 on the CPU when not given.
        seed: fixes the samples, whatever the batch and the ranks.
        model_parallel_size: ranks per model; all of them when not given.
        timeout: seconds that a collective may take before the run is given up.
    """
    settings = dict(locals())
    from src.checkpoint.load import load_model
    from src.data.rows import read_prompt_rows, write_jsonl
    from src.evaluation.solver import cut_at
    from src.generation.beam import engine_of
    from src.generation.engine import Stop
    from src.generation.journal import Journal, generate_all
    from src.generation.sampling import Sampling
    from src.inputs import check_beams, check_flags, check_writable, open_model, within
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop

    check_flags(settings)
    check_beams(settings)
    sampling = Sampling(
        max_new_tokens, temperature, top_p, top_k, seed, min_p, repetition_penalty, min_new_tokens
    )
    parallel = start(model_parallel_size, timeout)

    def read_inputs():
        check_writable(output_file, ".jsonl", input_file)
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
        rows = read_prompt_rows(input_file)[:max_rows]
        prompts = [opened.tokenizer.prompt_ids(row["instruction"]) for row in rows]
        what = f"prompts of {input_file}, with one token more,"
        warning = within([len(prompt) + 1 for prompt in prompts], max_seq_len, False, what)[1]
        return opened, rows, prompts, warning, Journal(Path(output_file), settings, parallel)

    opened, rows, prompts, warning, journal = agreed(read_inputs)
    with RunLog(None, "solver_generate", settings, parallel.rank) as log:
        if warning:
            log.warning(f"{warning}: their outputs are empty")
        model = load_model(
            opened.checkpoint, parallel, pick_dtype(dtype, parallel.device), "lm", seed, quantize
        ).eval()
        engine = engine_of(
            model, parallel, max_batch_size, max_seq_len, kv_cache_gb, num_beams, length_penalty
        )
        asked = [(i, row["instruction"]) for i, row in enumerate(rows) for _ in range(num_samples)]
        prompts = [prompt for prompt in prompts for _ in range(num_samples)]
        stops = tuple(stop_strings or ())
        completions = generate_all(
            engine,
            prompts,
            sampling,
            Stop(opened.tokenizer.stop_ids, stops, opened.tokenizer.decode),
            log,
            "generating",
            journal,
        )
        if parallel.is_main:
            lines = [
                {
                    "index": index,
                    "instruction": instruction,
                    "output": cut_at(opened.tokenizer.decode(c.tokens), stops),
                    "tokens": c.tokens,
                    "logprobs": c.logprobs,
                    "stop_reason": c.stop_reason,
                }
                for (index, instruction), c in zip(asked, completions)
            ]
            write_jsonl(output_file, lines)
            journal.remove()
        log.info(f"wrote {len(prompts)} outputs to {output_file}")
    stop()


if __name__ == "__main__":
    run(main)
