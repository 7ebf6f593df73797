"""PPO's outer loop: which prompts, which learning rates, when to evaluate, what to log."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from src.checkpoint.files import read_json
from src.errors import UserError
from src.logs import RunLog
from src.ppo.buffer import Prompt
from src.ppo.settings import SHAPING, PPOSettings
from src.ppo.trainer import PPO
from src.trainer.fit import EndlessBatches
from src.trainer.optimizer import lr_at
from src.trainer.saving import Saving

STATE_FILE = "ppo_state.json"
DEFAULT_KL_COEF = 0.05
SHOWN = ("reward", "kl", "entropy", "response_length", "truncated", "clipfrac")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. `iterations`, when given, ends the run early, or goes on past the epochs.

    Evaluations come every `eval_every` iterations, or after each epoch.
    """

    lr: float
    critic_lr: float
    warmup: float
    schedule: str
    epochs: int
    iterations: int | None
    seed: int
    eval_every: int | None = None
    max_skipped_steps: int = 30

    def __post_init__(self) -> None:
        counts = (self.epochs, 1 if self.iterations is None else self.iterations)
        if min(counts) < 1 or min(self.lr, self.critic_lr) <= 0 or not 0 <= self.warmup < 1:
            raise UserError(
                f"--lr {self.lr} --critic_lr {self.critic_lr} --warmup {self.warmup} --epochs {self.epochs} --iterations "
                f"{self.iterations}: the rates must be positive, the counts 1 or more, warmup in [0, 1)"
            )


def fit(
    ppo: PPO,
    prompts: list[Prompt],
    plan: Schedule,
    log: RunLog,
    evaluate: Callable[[str, int], None],
    saving: Saving | None = None,
) -> list[dict[str, float]]:
    """Run the iterations, from where an earlier run stopped. Returns what was logged of each.

    `evaluate` is called before the first, as the plan says, and at the end, with a name ("iteration 20") and its number.
    """
    samples = ppo.settings.samples_per_prompt
    per_iteration = ppo.settings.max_buffer_size // samples
    per_epoch = -(-len(prompts) // per_iteration)
    total = plan.iterations or per_epoch * plan.epochs
    unit, every = ("iteration", plan.eval_every) if plan.eval_every else ("epoch", per_epoch)
    batches, history, start = (
        EndlessBatches(len(prompts), per_iteration, f"{plan.seed}/prompts"),
        [],
        0,
    )
    if saving:
        saving.parts["prompts"] = batches.part
        start = saving.resume(total)

    def draw() -> list[Prompt]:
        return [prompts[i] for i in next(batches) for _ in range(samples)]

    if start == 0:
        evaluate(f"{unit} 0", 0)
    with log.progress(total, "PPO", unit="iteration", initial=start) as bar:
        for number in range(start, total):
            batch = draw()
            lr, critic_lr = (
                lr_at(number, total, rate, plan.warmup, plan.schedule)
                for rate in (plan.lr, plan.critic_lr)
            )
            stats = ppo.iteration(number, batch, lr, critic_lr, more=draw)
            _warn(number, stats, log)
            for role in ppo.stage.roles.values():
                if role.optimizer:
                    role.optimizer.check_skipped(
                        plan.max_skipped_steps,
                        f"the {role.name}'s minibatches of iteration {number + 1}",
                    )
            history.append(stats)
            log.scalars(number + 1, {**stats, "lr": lr, "critic_lr": critic_lr}, prefix="ppo")
            tokens = int(stats.get("response_length", 0) * len(batch))
            bar.update(1, tokens=tokens, **{name: stats[name] for name in SHOWN if name in stats})
            if (number + 1) % every == 0 or number + 1 == total:
                at = number + 1 if unit == "iteration" else -(-(number + 1) // per_epoch)
                evaluate(f"{unit} {at}", at)
            if saving:
                saving.after(number + 1)
    return history


def _warn(number: int, stats: dict[str, float], log: RunLog) -> None:
    if stats.get("policy_skipped") or stats.get("value_skipped"):
        log.warning(
            f"iteration {number + 1}: steps with a gradient norm that is not finite were skipped"
        )
    if "response_length" not in stats:
        log.warning(
            f"iteration {number + 1}: the rewards of each prompt's samples were all equal: nothing was learned"
        )


def read_state(folder: str) -> dict:
    """Where an earlier PPO run left a role, {} without one. Raises UserError for what cannot be a state."""
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        return {}
    state = read_json(path)
    kl_coef = state.get("kl_coef", DEFAULT_KL_COEF)
    if not isinstance(kl_coef, (int, float)) or not 0 <= kl_coef < 1e6:
        raise UserError(
            f"{path}: kl_coef is {kl_coef!r}, a number from 0 is expected; or give --kl_coef"
        )
    for name in ("reward_moments", "value_moments"):
        sums = state.get(name, [0.0, 0.0, 0.0])
        if not (
            isinstance(sums, list)
            and len(sums) == 3
            and all(_is_number(x) for x in sums)
            and sums[0] >= 0 <= sums[2]
        ):
            raise UserError(
                f"{path}: {name} is {sums!r}; three finite numbers are expected: of weights, values and squares"
            )
    return state


def _is_number(x) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


def changed_rewards(state: dict, settings: PPOSettings) -> str | None:
    """What this run does otherwise with the reward than the one that left `state`, in words; None when nothing."""
    before, now = {name: state[name] for name in SHAPING if name in state}, settings.shaping()
    changed = [
        f"--{name} {before.get(name)} → {now.get(name)}"
        for name in SHAPING
        if before.get(name) != now.get(name)
    ]
    return ", ".join(changed).replace("None", "(default)") if state and changed else None
