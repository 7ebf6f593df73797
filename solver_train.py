"""Train a solver (policy) on instructions and outputs: supervised fine-tuning, tensor- and data-parallel.

    torchrun --nproc_per_node 8 solver_train.py --ckpt_dir CKPT --save_dir OUT --train_file train.json \
        --model_type llama-1-7b --max_batch_size 6 --lora_rank -1

Rows of the train file: {"instruction": "...", "output": "..." or ["...", "..."]}. CKPT is a folder of shards for any
degree, or a Hugging Face folder. OUT becomes shards for this run's degree; with LoRA, merged ones with the adapter beside.
"""

from typing import Literal

from src.cli import run


def main(
    ckpt_dir: str,
    save_dir: str,
    train_file: str,
    model_type: str | None = None,
    tokenizer_file: str | None = None,
    config_file: str | None = None,
    adapter_dir: str | None = None,
    use_chat_template: bool = False,
    max_batch_size: int = 6,
    max_tokens_per_batch: int | None = None,
    accumulation_steps: int = 1,
    max_seq_len: int = 1024,
    strict_length: bool = False,
    lr: float = 1e-5,
    epochs: int = 1,
    warmup: float = 0.03,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    weight_decay: float = 0.0,
    beta2: float = 0.999,
    max_grad_norm: float = 1.0,
    max_skipped_steps: int = 30,
    lora_rank: int = -1,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    lora_targets: list[str] | None = None,
    quantize: Literal["nf4", "int8"] | None = None,
    freeze_layers: int = 0,
    router_aux_loss_coef: float | None = None,
    checkpoint_activations: Literal["none", "selective", "full"] = "none",
    compile: bool = False,
    zero: Literal[0, 1] = 1,
    task: str | None = None,
    label_file: str | None = None,
    eval_every: int | None = None,
    keep_best: str | None = None,
    eval_batch_size: int = 384,
    max_new_tokens: int = 256,
    save_every: int | None = None,
    keep: int = 2,
    resume: str = "auto",
    log_dir: str | None = None,
    profile: bool = False,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    seed: int = 0,
    model_parallel_size: int | None = None,
    timeout: float = 1800.0,
):
    """Train, and evaluate before the first and after every epoch when --task and --label_file are given.

    Args:
        ckpt_dir: the model to start from: shards for any degree, or a Hugging Face folder.
        save_dir: the folder to write; replaced as a whole when it already holds a checkpoint.
        train_file: .json or .jsonl rows with "instruction" and "output".
        model_type: a name such as llama-2-7b to check the sizes against.
        tokenizer_file: found in ckpt_dir when not given.
        config_file: params.json or config.json; found in ckpt_dir when not given.
        adapter_dir: a LoRA adapter in PEFT's format: trained on with --lora_rank, else added to the weights first.
        use_chat_template: write each instruction as a user's turn, by the checkpoint's chat template or the family's.
        max_batch_size: sequences in one forward and backward, per data-parallel rank.
        max_tokens_per_batch: and their tokens, at most; a longer row goes alone. Optimizer steps stay the same: there are more
            forwards in each. No limit when not given.
        accumulation_steps: micro-batches per optimizer step.
        max_seq_len: rows with more tokens are left out and counted.
        strict_length: refuse such rows instead.
        lr: the highest learning rate.
        epochs: passes over the train file.
        warmup: share of the steps in which the learning rate rises.
        schedule: how it falls afterwards.
        weight_decay: AdamW's, on matrices.
        beta2: AdamW's decay of the squared gradient's mean; lower adapts faster.
        max_grad_norm: the gradient is scaled down to this norm.
        max_skipped_steps: stop after so many steps in a row whose gradient norm was not finite; each is skipped, and counted.
        lora_rank: rank of the adapter; -1 trains all weights.
        lora_alpha: the adapter's output is scaled by lora_alpha / lora_rank; 16 when not given.
        lora_dropout: share of the adapter's inputs that are dropped in training.
        lora_targets: layers to adapt, of wq,wk,wv,wo,w1,w2,w3; all of them when not given (with experts: attention's).
        quantize: keep the frozen weights in 4 or 8 bits; needs --lora_rank.
        freeze_layers: train neither the embedding nor this many layers from the bottom.
        router_aux_loss_coef: weight of the experts' load-balancing loss; the model's own when not given.
        checkpoint_activations: what of each block is computed again in backward, to save memory: nothing (none), all but products
            and attention (selective), or all but its input (full).
        compile: let torch.compile make one kernel each of the norms and of SwiGLU; on the CPU that needs a C++ compiler.
        zero: 1 shares the optimizer's state among the data-parallel ranks (ZeRO stage 1); 0 keeps it whole on each.
        task: what to evaluate on, such as GSM8K.
        label_file: the task's rows.
        eval_every: evaluate every so many steps; after each epoch when not given.
        keep_best: a metric of the evaluation, such as accuracy: the model is also saved, to SAVE_DIR-best, whenever it is higher
            than ever.
        eval_batch_size: sequences generated at a time, at most.
        max_new_tokens: of one answer in evaluations.
        save_every: keep what is needed to go on, in SAVE_DIR-state, every so many steps; without it only when a signal ends the run.
        keep: so many of the newest of these stay.
        resume: auto goes on from the newest there, if the run is the same (a finished one says so); none begins anew; or the path of
            one of them.
        log_dir: for the log, TensorBoard events and evaluation results; SAVE_DIR-logs when not given.
        profile: write a trace of steps 4 and 5 for https://ui.perfetto.dev to the log folder, one file per rank.
        dtype: of weights and activations; bf16 on a GPU and fp32 on the CPU when not given.
        seed: of everything random.
        model_parallel_size: ranks per model; all of them when not given.
        timeout: seconds that a collective may take before the run is given up.
    """
    settings = dict(locals())
    from src.checkpoint.folder import beside, check_apart
    from src.checkpoint.load import load_model
    from src.checkpoint.save import check_save, save_model
    from src.evaluation.training import KeepBest, SolverEvaluation
    from src.inputs import (
        check_flags,
        check_log_dir,
        check_model_flags,
        lora_of,
        open_model,
        solver_sequences,
    )
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop
    from src.trainer.fit import FitSettings, fit, prepare
    from src.trainer.optimizer import Optimizer
    from src.trainer.saving import Earlier, Saving
    from src.trainer.solver import SolverObjective

    check_flags(settings)
    fit_settings = FitSettings.of(settings)
    parallel = start(model_parallel_size, timeout)

    number_type, logs = pick_dtype(dtype, parallel.device), log_dir or beside(save_dir, "logs")
    best_dir = beside(save_dir, "best") if keep_best else None

    def read_inputs():
        check_log_dir(logs, ckpt_dir, adapter_dir)
        read = {"ckpt_dir": ckpt_dir, "adapter_dir": adapter_dir, "train_file": train_file}
        saved = {"save_dir": save_dir} | ({"keep_best": best_dir} if best_dir else {})
        check_apart(saved, {**read, "log_dir": logs})
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
        check_model_flags(settings, opened.checkpoint)
        check_save(save_dir, opened.checkpoint, number_type, len(saved))
        if best_dir:
            check_save(best_dir, opened.checkpoint, number_type, len(saved))
        evaluation = SolverEvaluation.read(
            task, label_file, eval_batch_size, max_new_tokens, max_seq_len
        )
        KeepBest.check(keep_best, eval_every, evaluation.metrics)
        lora = lora_of(settings, opened.checkpoint)
        return (
            opened,
            lora,
            evaluation,
            *solver_sequences(train_file, opened.tokenizer, max_seq_len, strict_length),
        )

    opened, lora, evaluation, sequences, warning = agreed(read_inputs)
    rows_per_step = max_batch_size * accumulation_steps * parallel.dp_size
    earlier = Earlier.find(settings | {"rows_per_step": rows_per_step}, [save_dir], parallel)
    model = load_model(opened.checkpoint, parallel, number_type, "lm", seed, quantize, lora)
    with RunLog(logs, "solver_train", settings, parallel.rank) as log:
        if warning:
            log.warning(f"{warning} and are left out")
        log.info(
            f"{len(sequences)} rows; ranks: {parallel.mp_size} model-parallel × {parallel.dp_size} data-parallel"
        )
        prepare(model, settings, parallel)

        def save(folder: str) -> None:
            save_model(
                model,
                parallel,
                folder,
                opened.checkpoint,
                opened.tokenizer.path,
                opened.tokenizer.borrowed_template,
            )

        best = KeepBest(keep_best, lambda: save(best_dir), log)

        def evaluate(at: str, number: int) -> None:
            best.consider(
                at,
                number,
                evaluation.run(at, number, model, opened.tokenizer, parallel, log, settings),
            )

        optimizer = Optimizer(
            model, parallel, weight_decay, max_grad_norm, betas=(0.9, beta2), zero=zero
        )
        saving = Saving(
            earlier, settings, {"model": (model, optimizer)}, parallel, log, {"best": best.part}
        )
        objective = SolverObjective(sequences, parallel.device)
        fit(model, optimizer, objective, fit_settings, parallel, log, evaluate, saving)
        save(save_dir)
        log.info(f"saved to {save_dir}")
        saving.finish()
    stop()


if __name__ == "__main__":
    run(main)
