"""Training with other software on the same rows in the same order.

TRL's trainers, and a plain padded transformers loop. Each run is a process of its own, started by
`training.py`; it prints one line of JSON.
"""

import copy
import time
from pathlib import Path

import torch

VOCABULARY = 32_000


def padded(rows: list[list[int]], fill: int = 0) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def sides(model, batch: list) -> torch.Tensor:
    """Σ log p of the chosen and then of the rejected responses, [2 · batch]."""
    rows = [pair[0] for pair in batch] + [pair[1] for pair in batch]
    prompts = [pair[2] for pair in batch] * 2
    ids, mask = padded(rows), padded([[1] * len(row) for row in rows])
    logits = model(ids, attention_mask=mask).logits[:, :-1].float()
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    place = torch.arange(1, ids.size(1))
    wanted = (place >= torch.tensor(prompts).unsqueeze(1)) & (mask[:, 1:] > 0)
    return (logprobs * wanted).sum(-1)


def plain_loop(folder: Path, job: dict) -> dict:
    """transformers and torch.optim alone.

    A padded batch, autocast for bf16, fused AdamW on fp32 weights.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    verifier, preference = job["task"] == "verifier", job["task"].startswith("dpo")
    kind = AutoModelForSequenceClassification if verifier else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    model.config.pad_token_id = 0
    frozen = copy.deepcopy(model).requires_grad_(False) if preference else None
    ratios = [] if job["task"] == "dpo-kept" else None  # of the reference, found before

    def margins(batch: list) -> torch.Tensor:
        """log p(chosen) − log p(rejected) of the reference, [batch]."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            chosen, rejected = sides(frozen, batch).chunk(2)
        return chosen - rejected

    in_bf16 = job["dtype"] == "bf16"
    if ratios is not None:
        ratios = [margins(batch) for batch in job["batches"]]
        frozen = None
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0, fused=True)
    losses, ends = [], []
    for number, batch in enumerate(job["batches"]):
        reference = None
        if preference:
            reference = margins(batch) if ratios is None else ratios[number]
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            if preference:
                chosen, rejected = sides(model, batch).chunk(2)
                margin = 0.1 * (chosen - rejected - reference)
                loss = -torch.nn.functional.logsigmoid(margin).mean()
            elif verifier:
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
    """SFTTrainer on completions only, RewardTrainer, or DPOTrainer.

    Without what costs time: recomputation, saving, reports.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )

    named = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary = named | {f"w{i}": i for i in range(3, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = {i: word for word, i in vocabulary.items()}
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
    elif job["task"].startswith("dpo"):
        from trl import DPOConfig, DPOTrainer

        def spelled(ids: list[int]) -> str:
            return " ".join(texts[i] for i in ids)

        data = [
            {
                "prompt": spelled(chosen[:n]),
                "chosen": f" {spelled(chosen[n:])}",
                "rejected": f" {spelled(rejected[n:])}",
            }
            for chosen, rejected, n in rows
        ]
        model, reference = (
            AutoModelForCausalLM.from_pretrained(folder, **loaded) for _ in range(2)
        )
        trainer = DPOTrainer(
            model=model,
            ref_model=reference,
            args=DPOConfig(beta=0.1, **common),
            train_dataset=Dataset.from_list(data),
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
