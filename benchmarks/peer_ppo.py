"""One PPO iteration by TRL 0.24's PPOTrainer, timed.

    python benchmarks/peer_ppo.py JOB.json

A process of its own in its own environment, started by `ppo.py`. JOB.json: {"policy", "verifier",
"prompts", "iterations", "new", …}, see `main`. Prints one line of JSON: seconds of each iteration
and of its phases, optimizer steps, the most memory held.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import PPOConfig, PPOTrainer
from trl.trainer import ppo_trainer


class Clock(TrainerCallback):
    """Where each iteration begins and ends, and its phases.

    The phases: generate, score (forwards without gradient), update.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.marks: list[dict[str, float]] = [{}]
        self.lengths: set[int] = set()  # of responses

    def mark(self, name: str) -> None:
        self.marks[-1].setdefault(name, time.perf_counter())

    def on_train_begin(self, *_, **__):
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())
        self.marks.append({})

    def seconds(self) -> list[float]:
        return [end - begin for begin, end in zip(self.ends, self.ends[1:])]

    def phases(self) -> list[dict[str, float]]:
        return [
            {
                "generate": marks["generated"] - begin,
                "score": marks["update"] - marks["generated"],
                "update": end - marks["update"],
            }
            for begin, end, marks in zip(self.ends, self.ends[1:], self.marks)
        ]


def watch(clock: Clock) -> None:
    """Note when generation ends and when the first forward with gradients begins."""
    generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward

    def batch_generation(model, queries, *args, **kwargs):
        rows, logits = generation(model, queries, *args, **kwargs)
        clock.mark("generated")
        clock.lengths.add(rows.shape[1] - queries.shape[1])
        return rows, logits

    def timed_forward(*args, **kwargs):
        if torch.is_grad_enabled():
            clock.mark("update")
        return forward(*args, **kwargs)

    ppo_trainer.batch_generation, ppo_trainer.forward = batch_generation, timed_forward


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """Rows are ids already; it only pads, on the left, with an id that the model cannot draw.

    TRL masks that everywhere.
    """
    words = {f"<{i}>": i for i in range(vocab_size + 1)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")),
        bos_token="<1>",
        eos_token="<2>",
        pad_token=f"<{vocab_size}>",
        padding_side="left",
    )


def main(job: dict) -> dict:
    """Train for the iterations of a job, and tell how long each took.

    job: folders "policy" and "verifier", "prompts" as ids, "iterations", "epochs", "mini_batches",
    "new" tokens each, "kl_coef", a folder "out", and "settings": "rollout" (sequences generated and
    scored at a time), "micro" (in one forward and backward), "attention", "use_cache", "compile".
    """
    settings, rows = job["settings"], len(job["prompts"])
    attention = settings.get("attention", "sdpa")

    def load(kind, folder: str):
        model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        # generation has its cache either way
        model.config.use_cache = settings.get("use_cache", False)
        return model

    policy, reference = (load(AutoModelForCausalLM, job["policy"]) for _ in range(2))
    value, reward = (load(AutoModelForSequenceClassification, job["verifier"]) for _ in range(2))
    mini = rows // job["mini_batches"]
    micro = settings.get("micro", mini)
    clock = Clock()
    watch(clock)
    # One micro-batch is a minibatch when the batch is given in one piece. In smaller pieces TRL
    # 0.24 would step once per `gradient_accumulation_steps` of them, four times per iteration;
    # hence the accelerator is told below.
    piece = micro if micro < mini else rows
    args = PPOConfig(
        output_dir=job["out"],
        per_device_train_batch_size=piece,
        gradient_accumulation_steps=rows // piece,
        num_mini_batches=job["mini_batches"],
        num_ppo_epochs=job["epochs"],
        total_episodes=rows * job["iterations"],
        response_length=job["new"],
        stop_token=None,
        temperature=1.0,
        kl_coef=job["kl_coef"],
        local_rollout_forward_batch_size=settings.get("rollout", rows),
        num_sample_generations=0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        eval_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        torch_compile=settings.get("compile", False),
    )
    data = Dataset.from_list([{"input_ids": row} for row in job["prompts"]])
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer_of(policy.config.vocab_size),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[clock],
    )
    if micro < mini:
        trainer.accelerator.gradient_accumulation_steps = mini // micro
        trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    steps = []
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()
    wanted = job["epochs"] * job["mini_batches"] * job["iterations"]
    if len(steps) != wanted or clock.lengths != {job["new"]}:
        raise SystemExit(
            f"{len(steps)} optimizer steps in {job['iterations']} iterations, "
            f"responses of {clock.lengths} tokens"
        )
    return {
        "seconds": clock.seconds(),
        "phases": clock.phases(),
        "optimizer_steps": len(steps) // job["iterations"],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))), flush=True)
