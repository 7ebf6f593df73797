"""Log-probabilities of given outputs, token by token.

    torchrun --nproc_per_node 8 solver_score.py --ckpt_dir CKPT --input_file rows.jsonl --output_file out.jsonl

Rows in: {"instruction": "...", "output": "..."}. Rows out, in the input's order: {"prompt_tokens": [...], "tokens": [...],
"logprobs": [...], "sum": x}; tokens are the output's ids, EOS included, and logprobs natural logarithms.
"""

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
    max_batch_size: int = 64,
    max_seq_len: int = 1024,
    temperature: float = 1.0,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    seed: int = 0,
    model_parallel_size: int | None = None,
    timeout: float = 1800.0,
):
    """Write one line per row.

    Args:
        ckpt_dir: the solver: shards for any degree, or a Hugging Face folder.
        input_file: .json or .jsonl rows with "instruction" and "output" (one string).
        output_file: .jsonl to write.
        model_type: a name such as llama-2-7b to check the sizes against.
        tokenizer_file: found in ckpt_dir when not given.
        config_file: params.json or config.json; found in ckpt_dir when not given.
        adapter_dir: a LoRA adapter in PEFT's format to add to the weights.
        use_chat_template: write each instruction as a user's turn, by the checkpoint's chat template or the family's.
        quantize: keep the linear layers' weights in 4 or 8 bits.
        max_batch_size: sequences in one forward.
        max_seq_len: longer rows are refused.
        temperature: divides the logits before the softmax.
        dtype: of weights and activations; bf16 on a GPU and fp32 on the CPU when not given.
        seed: taken by every script; nothing is random here.
        model_parallel_size: ranks per model; all of them when not given.
        timeout: seconds that a collective may take before the run is given up.
    """
    settings = dict(locals())
    import torch

    from src.checkpoint.load import load_model
    from src.data.rows import TEXT, read_rows, write_jsonl
    from src.errors import UserError
    from src.inputs import check_flags, check_writable, encode, open_model, within
    from src.logs import RunLog
    from src.models.batch import Batch, over_ranks, response_logprobs
    from src.parallel.setup import agreed, pick_dtype, start, stop

    check_flags(settings)
    if temperature == 0:
        raise UserError(
            "--temperature 0: the log-probabilities of a greedy choice are 0 or minus infinity; give one above 0"
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
        rows = read_rows(input_file, {"instruction": TEXT, "output": TEXT})
        sequences = [encode(opened.tokenizer, row["instruction"], row["output"]) for row in rows]
        within([len(s.tokens) for s in sequences], max_seq_len, True, f"rows of {input_file}")
        return opened, sequences

    opened, sequences = agreed(read_inputs)
    with RunLog(None, "solver_score", settings, parallel.rank) as log, torch.no_grad():
        model = load_model(
            opened.checkpoint, parallel, pick_dtype(dtype, parallel.device), "lm", seed, quantize
        ).eval()

        def score(rows: list[int]) -> list[list[float]]:
            batch = Batch.of([sequences[i] for i in rows], parallel.device)
            return [
                x.tolist()
                for x in response_logprobs(model, batch, temperature)[0].split(batch.responses)
            ]

        with log.progress(len(sequences), "scoring", unit="row") as bar:
            scored = over_ranks(
                score, [len(s.tokens) for s in sequences], max_batch_size, parallel, bar
            )
        if parallel.is_main:
            lines = [
                {
                    "prompt_tokens": list(s.tokens[: s.prompt_length]),
                    "tokens": list(s.tokens[s.prompt_length :]),
                    "logprobs": logprobs,
                    "sum": sum(logprobs),
                }
                for s, logprobs in zip(sequences, scored)
            ]
            write_jsonl(output_file, lines)
        log.info(f"wrote {len(sequences)} rows to {output_file}")
    stop()


if __name__ == "__main__":
    run(main)
