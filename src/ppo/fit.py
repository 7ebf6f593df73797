"""PPO's outer loop: which prompts, which learning rates, when to evaluate, what to log."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from src.checkpoint.json_file import read_json
from src.data.encoding import Prompt
from src.data.mixture import Mixture
from src.errors import UserError
from src.logs import RunLog
from src.parallel.clock import clock
from src.parallel.setup import agreed
from src.ppo.rewards import RewardFailed
from src.ppo.trainer import PPO
from src.progress import Progress
from src.settings.ppo import SHAPING, PolicyOptimizerSettings, ShapedRewardSettings
from src.trainer.batches import EndlessBatches
from src.trainer.optimizer import lr_at
from src.trainer.saving import Saving

STATE_FILE = "ppo_state.json"
DEFAULT_KL_COEF = 0.05
SHOWN = ("reward", "kl", "entropy", "response_length", "truncated", "clipfrac")


def iterations_of(
    n_prompts: int, per_iteration: int, plan: PolicyOptimizerSettings
) -> tuple[int, int]:
    """Iterations per epoch, and in all: --iterations ends a run early, or goes on past epochs."""
    per_epoch = -(-n_prompts // per_iteration)
    return per_epoch, plan.iterations or per_epoch * plan.epochs


def fit(
    ppo: PPO,
    prompts: list[Prompt],
    plan: PolicyOptimizerSettings,
    seed: int,
    eval_every: int | None,
    log: RunLog,
    evaluate: Callable[[str, int], None],
    saving: Saving | None = None,
    mixture: Mixture | None = None,
) -> list[dict[str, float]]:
    """Run the iterations, from where an earlier run stopped. Returns what was logged of each.

    `evaluate` is called before the first, every `eval_every` iterations or after each epoch, and at
    the end, with a name ("iteration 20") and its number. mixture: of the prompts; an epoch has all
    of them when not given.
    """
    rollouts = ppo.settings.rollouts
    samples = rollouts.samples_per_prompt
    per_iteration = rollouts.max_buffer_size // samples
    mixture = mixture or Mixture((len(prompts),))
    per_epoch, total = iterations_of(mixture.n_rows, per_iteration, plan)
    unit, every = ("iteration", eval_every) if eval_every else ("epoch", per_epoch)
    batches = EndlessBatches(mixture, per_iteration, f"{seed}/prompts")
    history: list[dict[str, float]] = []

    def draw() -> list[Prompt]:
        return [prompts[i] for i in next(batches) for _ in range(samples)]

    # Go on where an earlier run stopped, or measure the untrained policy.
    start = 0
    if saving:
        saving.parts["prompts"] = batches.part
        start = saving.resume(total)

    def evaluate_aside(bar: Progress, name: str, number: int, done: int) -> None:
        clock.announce("evaluation")
        with bar.aside(left=-(-total // every) - -(-done // every)):
            evaluate(name, number)

    with log.progress(total, "PPO", unit="iteration", initial=start) as bar:
        if start == 0:
            evaluate_aside(bar, f"{unit} 0", 0, done=0)
        for number in range(start, total):
            taken, batch = batches.taken, draw()
            lr, critic_lr = (
                lr_at(number, total, rate, plan.warmup, plan.schedule)
                for rate in (plan.lr, plan.critic_lr)
            )
            try:
                stats = ppo.iteration(number, batch, lr, critic_lr, more=draw)
            except RewardFailed as error:
                batches.taken = taken  # these prompts are still to come
                if saving:
                    saving.failed("reward_file", error)
                raise

            # What went wrong, and what it brought.
            _warn(number, stats, log)
            _check_skipped(ppo, number, stats, plan.max_skipped_steps)
            history.append(stats)
            log.scalars(number + 1, {**stats, "lr": lr, "critic_lr": critic_lr}, prefix="ppo")
            tokens = int(stats.get("response_length", 0) * len(batch))
            bar.update(1, tokens=tokens, **{name: stats[name] for name in SHOWN if name in stats})

            # Evaluate and save when it is time.
            done = number + 1
            if saving:  # of the timer's phases, which hold waiting, generating is a rank's own
                phases = {**clock.take(), "generate": stats.get("seconds/generate", 0.0)}
                saving.monitor.took(done, phases, stats)
            if done % every == 0 or done == total:
                moment = done if unit == "iteration" else -(-done // per_epoch)
                evaluate_aside(bar, f"{unit} {moment}", moment, done)
            if saving:
                saving.after(done)
    return history


def _warn(number: int, stats: dict[str, float], log: RunLog) -> None:
    if stats.get("policy_skipped") or stats.get("value_skipped"):
        log.warning(
            f"iteration {number + 1}: steps with a gradient norm that is not finite were skipped"
        )
    silent = stats.get("no_opinion", 0.0)
    if silent:
        log.warning(
            f"iteration {number + 1}: {100 * silent:.1f} % of the responses got no reward (no "
            "opinion) and were left out"
        )
    if "response_length" not in stats:
        why = (
            "no response got a reward"
            if silent == 1
            else ("the rewards of each prompt's samples were all equal")
        )
        log.warning(f"iteration {number + 1}: {why}: nothing was learned")


def _check_skipped(ppo: PPO, number: int, stats: dict[str, float], limit: int) -> None:
    for role in ppo.stage.roles.values():
        if role.optimizer and stats.get(f"{role.name}_skipped"):
            minibatches = f"the {role.name}'s minibatches of iteration {number + 1}"
            # A rank that has nothing of the role has skipped nothing.
            agreed(partial(role.optimizer.check_skipped, limit, minibatches))


def read_state(folder: str | None) -> dict[str, Any]:
    """Where an earlier PPO run left a role, {} without one.

    Raises UserError for what cannot be a state.
    """
    path = Path(folder or "") / STATE_FILE
    if not folder or not path.is_file():
        return {}
    state = read_json(path)
    kl_coef = state.get("kl_coef", DEFAULT_KL_COEF)
    if not isinstance(kl_coef, (int, float)) or not 0 <= kl_coef < 1e6:
        raise UserError(
            f"{path}: kl_coef is {kl_coef!r}, a number from 0 is expected; or give --kl_coef"
        )
    for name in ("reward_moments", "value_moments"):
        sums = state.get(name, [0.0, 0.0, 0.0])
        is_triple = isinstance(sums, list) and len(sums) == 3 and all(map(_is_number, sums))
        if not is_triple or not sums[0] >= 0 <= sums[2]:
            raise UserError(
                f"{path}: {name} is {sums!r}; three finite numbers are expected: of weights, "
                "values and squares"
            )
    return state


def _is_number(x: object) -> bool:
    return type(x) in (int, float) and math.isfinite(x)  # type: ignore[arg-type]


def changed_rewards(state: dict[str, Any], rewards: ShapedRewardSettings) -> str | None:
    """What this run does otherwise with the reward than the one that left `state`, in words.

    None when nothing.
    """
    before = {name: state[name] for name in SHAPING if name in state}
    now = rewards.shaping()
    changes = [
        f"--{name} {before.get(name)} → {now.get(name)}"
        for name in SHAPING
        if before.get(name) != now.get(name)
    ]
    return ", ".join(changes).replace("None", "(default)") if state and changes else None
