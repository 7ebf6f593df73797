"""What is to be trained: models, rows, lengths. The same for every layout that is tried."""

from dataclasses import dataclass

import torch

from src.models.config import ModelConfig
from src.planner.work import MicroBatch
from src.settings.ppo import ADVANTAGES

SFT, VERIFIER, PPO = "sft", "verifier", "ppo"


@dataclass(frozen=True)
class Job:
    """An optimizer step of rows, or an iteration of PPO.

    models: by role: "actor", and for PPO "critic", "reference", "reward", where there are such;
    of the other tasks "model". batch: rows of a step, or rollouts of an iteration, over all ranks;
    prompt, response: tokens, as most rows have them; longest: new tokens at most.
    """

    task: str
    models: dict[str, ModelConfig]
    dtype: torch.dtype
    batch: int
    prompt: int
    response: int
    longest: int
    samples_per_prompt: int = 1
    ppo_epochs: int = 4
    mini_batches: int = 4
    rollout_batch_size: int = 384
    advantage: str = "gae"

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        """Of a step, or of an iteration's rollouts."""
        role = "actor" if self.task == PPO else "model"
        return int(self.batch * self.micro_batch(1, role).tokens)

    def micro_batch(self, rows: float, role: str = "model") -> MicroBatch:
        """So many rows, as a role computes them."""
        window = self.models[role].sliding_window
        needed = 1 if role == "reward" else self.response
        if self.task != VERIFIER:
            return MicroBatch.of_rows(rows, self.length, needed, window)
        # Two outputs behind one prompt, which is computed once.
        both = MicroBatch.of_rows(2 * rows, self.length, 1, window)
        once = MicroBatch.of_rows(rows, self.prompt, 0, window)
        masked = 2 * rows * self.response * self.length
        return MicroBatch(
            both.tokens - once.tokens,
            once.pairs + masked,
            both.needed,
            both.tokens,
            masked,
        )


def job_of(
    task: str,
    actor: ModelConfig,
    critic: ModelConfig,
    advantage: str,
    has_reference: bool,
    has_verifier: bool = True,
    **rest,
) -> Job:
    """By the names of the settings. rest: what `Job` has beside its models."""
    if task != PPO:
        head = "score" if task == VERIFIER else "lm"
        return Job(task, {"model": actor.with_head(head)}, **rest)
    value = critic.with_head("score")
    models = {"actor": actor.with_head("lm")}
    if has_verifier:
        models["reward"] = value
    if has_reference:
        models["reference"] = models["actor"]
    if ADVANTAGES[advantage].needs_value:
        models["critic"] = value
    return Job(task, models, advantage=advantage, **rest)
