"""Training with other software on the same rows in the same order.

TRL's trainers, and a plain padded transformers loop. Each run is a process of its own, started by
`training.py`; it prints one line of JSON.
"""

import time
from pathlib import Path

import torch


def padded(rows: list[list[int]], fill: int = 0) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def plain_loop(folder: Path, job: dict) -> dict:
    """transformers and torch.optim alone.

    A padded batch, autocast for bf16, fused AdamW on fp32 weights.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    verifier = job["task"] == "verifier"
    kind = AutoModelForSequenceClassification if verifier else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    model.config.pad_token_id = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0, fused=True)
    losses, ends = [], []
    for batch in job["batches"]:
        with torch.autocast("cpu", torch.bfloat16, enabled=job["dtype"] == "bf16"):
            if verifier:
                rows = [pair[0] for pair in batch] + [pair[1] for pair in batch]
                mask = padded([[1] * len(row) for row in rows])
                scores = model(padded(rows), attention_mask=mask).logits.squeeze(-1)  # [2 · batch]
                chosen, rejected = scores.float().chunk(2)
                loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
            else:
                tokens = [row["tokens"] for row in batch]
                prompts = [row["prompt_length"] for row in batch]
                labels = [[-100] * n + row[n:] for row, n in zip(tokens, prompts)]
                mask = padded([[1] * len(row) for row in tokens])
                loss = model(padded(tokens), attention_mask=mask, labels=padded(labels, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(time.perf_counter())
    return {"losses": losses, "ends": ends}


def trl(folder: Path, job: dict) -> dict:
    """SFTTrainer on completions only, or RewardTrainer.

    Without what costs time: recomputation, saving, reports.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    losses, ends = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **__):
            if "loss" in logs:
                losses.append(logs["loss"])

    common = dict(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(job["batches"][0]),
        max_steps=len(job["batches"]),
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        logging_steps=1,
        logging_first_step=True,
        report_to=[],
        save_strategy="no",
        bf16=job["dtype"] == "bf16",
        gradient_checkpointing=False,
        max_length=None,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=True,
        **job.get("trl", {}),
    )
    rows = [row for batch in job["batches"] for row in batch]
    loaded = dict(dtype=torch.float32, attn_implementation="sdpa")
    if job["task"] == "verifier":
        from trl import RewardConfig, RewardTrainer

        model = AutoModelForSequenceClassification.from_pretrained(folder, **loaded)
        model.config.pad_token_id = 0
        data = Dataset.from_list(
            [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected, _ in rows]
        )
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(disable_dropout=False, **common),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
    else:
        from trl import SFTConfig, SFTTrainer

        model = AutoModelForCausalLM.from_pretrained(folder, **loaded)
        examples = []
        for row in rows:
            mask = [int(i >= row["prompt_length"]) for i in range(len(row["tokens"]))]
            examples.append({"input_ids": row["tokens"], "completion_mask": mask})
        data = Dataset.from_list(examples)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(completion_only_loss=True, **common),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
    trainer.train()
    return {"losses": losses, "ends": ends}
