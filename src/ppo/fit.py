"""PPO's outer loop: which prompts, which learning rates, when to evaluate, what to log."""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

from src.checkpoint.files import read_json
from src.errors import UserError
from src.logs import RunLog
from src.ppo.buffer import Prompt
from src.ppo.trainer import PPO
from src.trainer.optimizer import lr_at

STATE_FILE = "ppo_state.json"
DEFAULT_KL_COEF = 0.05
SHOWN = ("reward", "kl", "entropy", "response_length", "truncated", "clipfrac")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. `iterations`, when given, ends the run early, or goes on past the epochs."""

    lr: float
    critic_lr: float
    warmup: float
    schedule: str
    epochs: int
    iterations: int | None
    samples_per_prompt: int
    seed: int

    def __post_init__(self) -> None:
        counts = (self.epochs, self.samples_per_prompt, 1 if self.iterations is None else self.iterations)
        if min(counts) < 1 or min(self.lr, self.critic_lr) <= 0 or not 0 <= self.warmup < 1:
            raise UserError(
                f"--lr {self.lr} --critic_lr {self.critic_lr} --warmup {self.warmup} --epochs {self.epochs} --iterations "
                f"{self.iterations} --samples_per_prompt {self.samples_per_prompt}: the rates must be positive, the counts 1 "
                "or more, warmup in [0, 1)"
            )


def prompt_batches(n_prompts: int, per_iteration: int, seed: int) -> Iterator[list[int]]:
    """Prompt numbers for each iteration, without end. Every pass shuffles all prompts anew; batches are always full."""
    waiting: list[int] = []
    for epoch in itertools.count(1):
        order = list(range(n_prompts))
        random.Random(f"{seed}/prompts/epoch {epoch}").shuffle(order)
        waiting += order
        while len(waiting) >= per_iteration:
            yield waiting[:per_iteration]
            waiting = waiting[per_iteration:]


def fit(
    ppo: PPO, prompts: list[Prompt], plan: Schedule, log: RunLog, evaluate: Callable[[int], None]
) -> list[dict[str, float]]:
    """Run the iterations; `evaluate(epoch)` before the first, after every epoch, and at the end. Returns what was logged."""
    per_iteration = ppo.settings.max_buffer_size // plan.samples_per_prompt
    per_epoch = -(-len(prompts) // per_iteration)
    total = plan.iterations or per_epoch * plan.epochs
    history: list[dict[str, float]] = []
    evaluate(0)
    with log.progress(total, "PPO", unit="iteration") as bar:
        for number, chosen in zip(range(total), prompt_batches(len(prompts), per_iteration, plan.seed)):
            batch = [prompts[i] for i in chosen for _ in range(plan.samples_per_prompt)]
            lr, critic_lr = (lr_at(number, total, rate, plan.warmup, plan.schedule) for rate in (plan.lr, plan.critic_lr))
            stats = ppo.iteration(number, batch, lr, critic_lr)
            if stats["skipped"]:
                log.warning(f"iteration {number + 1}: steps with a gradient norm that is not finite were skipped")
            history.append(stats)
            log.scalars(number + 1, {**stats, "lr": lr, "critic_lr": critic_lr}, prefix="ppo")
            tokens = int(stats["response_length"] * len(batch))
            bar.update(1, tokens=tokens, **{name: stats[name] for name in SHOWN})
            if number + 1 == total or (number + 1) % per_epoch == 0:
                evaluate(-(-(number + 1) // per_epoch))
    return history


def write_state(folder: str, kl_coef: float) -> None:
    """Keep the KL controller's state beside the policy."""
    (Path(folder) / STATE_FILE).write_text(json.dumps({"kl_coef": kl_coef}) + "\n")


def read_kl_coef(folder: str) -> float:
    """Where an earlier PPO run of this policy left kl_coef, or the default."""
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        return DEFAULT_KL_COEF
    kl_coef = read_json(path).get("kl_coef")
    if not isinstance(kl_coef, (int, float)) or not 0 <= kl_coef < 1e6:
        raise UserError(f"{path}: kl_coef is {kl_coef!r}, a number from 0 is expected; or give --kl_coef")
    return float(kl_coef)
