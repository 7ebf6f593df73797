"""PPO iterations with each role in a layout of its own; the results are asserted on by pytest.

    torchrun --nproc_per_node 8 tests/ppo/layouts_worker.py FOLDER OUT

FOLDER is that of worker.py. One process gives what all others must equal.
"""

import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from src.parallel.setup import Parallel, start, stop
from src.parallel.sharding import own
from tests.ppo.worker import (
    LR,
    NUMBER,
    VALUE_LR,
    Recorder,
    everyones,
    make_ppo,
    prompts,
    whole,
)

NAMES = ("actor_train", "actor_gen", "critic_train", "critic_inf", "ref_inf", "rew_inf")


MEET_S = 60  # that a role waits for another to begin


@dataclass(frozen=True)
class Case:
    """layouts: of the phases in the order of NAMES, "" for what is not given; more: settings."""

    layouts: str
    more: dict = field(default_factory=dict)
    iterations: int = 1

    @property
    def settings(self) -> dict:
        return dict(ppo_epochs=1) | self.more

    @property
    def by_name(self) -> dict[str, str]:
        texts = [text.strip() for text in self.layouts.split("|")]
        return {name: text for name, text in zip(NAMES, texts) if text}


PAIRS = dict(samples_per_prompt=2, advantage="grpo")
CASES = {
    "asked": Case(
        "tp4 | dp8 | pp2 tp2 | | tp2 on 0-3 | tp2 on 4-7", dict(ppo_epochs=2), iterations=2
    ),
    # One phase elsewhere at a time.
    "gen dp8": Case("tp8 | dp8"),
    "gen tp8": Case("dp8 | tp8"),
    "gen on a half": Case("tp2 | tp2 on 4-7"),
    "gen of uneven ranks": Case("tp2 | dp3 on 1-3"),
    "critic smaller": Case("tp4 | | tp1"),
    "critic larger": Case("dp8 | | tp8"),
    "critic in stages": Case("tp4 | | pp2 tp4"),
    "critic on a half": Case("tp2 | | pp2 tp2 on 4-7"),
    "values elsewhere": Case("tp2 | | tp2 pp2 | tp1"),
    "values in stages": Case("tp2 | | tp8 | pp2 tp2"),
    "reference in stages": Case("tp4 | | | | pp2 tp2 dp2"),
    "reward on one rank": Case("tp2 | | | | | tp1 on 5"),
    # The policy on some of the ranks.
    "learns on a half": Case("tp2 on 0-3 | tp2 on 4-7 | tp4 on 4-7 | | tp1 on 4-7 | tp2 on 0-3"),
    "rank 0 has no policy": Case("pp2 tp2 on 4-7 | dp8 | dp2 on 0-1 | | tp2 on 0-1 | tp1 on 2"),
    "three models": Case("tp1 on 2-4 | tp2 on 0-5 | tp1 on 5-7 | tp2 on 0-1 | tp3 on 0-2 | "),
    # With what else is shared.
    "sp": Case("tp4 sp | dp8 | tp2 sp | | tp1 | tp8"),
    "zero3": Case("dp8 zero3 | tp2 | tp2 zero2 | tp1 | tp4 | tp2 on 2-3"),
    "zero3 on a half": Case("dp4 zero3 on 4-7 | tp2 on 0-3 | dp4 zero2 on 0-3 | | | tp1 on 0-1"),
    "zero2 and stages": Case("tp2 zero2 | tp4 | pp2 | tp1 | pp2 tp4 | tp2 on 6-7"),
    "zero0": Case("tp2 zero0 | dp8 | tp4 zero0 | tp8"),
    "all in stages": Case("pp2 tp2 | dp8 | pp2 tp4 | pp2 tp1 | pp2 tp1 on 0-3 | pp2 tp2 on 4-7"),
    # With other settings.
    "micro-batches": Case(
        "tp2 | dp8 | pp2 | tp1 | tp2 on 0-1 | dp2 on 2-3", dict(max_batch_size=1)
    ),
    "grpo": Case("tp4 | dp8 | | | pp2 on 0-1 | tp2 on 2-3", PAIRS),
    "filtered": Case("pp2 tp2 | tp1 | | | tp2 on 0-1 | tp2 on 2-3", PAIRS | dict(filter_rounds=1)),
    "moving reference": Case("pp2 tp2 | tp2 | tp4 | | tp1 on 1-3 | ", dict(ref_ema=0.7), 2),
    "mix": Case("tp2 on 4-7 | tp2 | tp2 on 0-3", dict(ptx_coef=0.4)),
    "target_kl": Case("tp2 on 4-7 | tp1 | tp4 on 0-3", dict(target_kl=0.25, ppo_epochs=2)),
    "value_norm": Case("tp2 on 4-7 | | tp2 on 0-3 | tp8", dict(value_norm=True, reward_norm=True)),
    "in turn": Case("tp2 | tp1 | tp4 | tp2 | tp1 | tp2 on 0-1", dict(update="in_turn")),
}


def one_case(folder: Path, parallel: Parallel, case: Case, layouts: dict[str, str]) -> dict:
    """What one process, and any ranks in any layouts, must come to; on every rank."""
    ppo = make_ppo(folder, parallel, layouts=layouts, **case.settings)
    recorder = Recorder(ppo)
    for number in range(NUMBER, NUMBER + case.iterations):
        recorder.steps.clear(), recorder.losses.clear()
        stats = ppo.iteration(number, prompts(), LR, VALUE_LR, more=prompts)
    everyones_stats = everyones({k: v for k, v in stats.items() if not is_cost(k)})
    weights = {name: whole_of(ppo, name) for name in ppo.stage.roles}
    return {
        "stats": everyones_stats,
        "costs": {name: x for name, x in stats.items() if is_cost(name)},
        "state": everyones(ppo.state.beside_weights()),
        "rollouts": recorder.rollouts(ppo.parallel),
        "weights": weights,
        "ratio starts at one": [
            ok
            for ok, is_member in everyones((recorder.ratio_starts_at_one(), ppo.parallel.is_member))
            if is_member
        ],
        "held": everyones(
            {
                name: sum(own(p).nbytes for p in role.model.parameters())
                for name, role in ppo.stage.roles.items()
            }
        ),
    }


def is_cost(name: str) -> bool:
    """Whether a number of the log is time or memory."""
    return name.startswith(("seconds", "tokens_per_s", "memory", "gb/"))


def whole_of(ppo, name: str) -> dict | None:
    """All weights of a role, from its first model, on every rank."""
    role = ppo.stage.roles[name]
    found = whole(ppo, name)
    return everyones(found if role.parallel.is_member else None)[role.parallel.layout.first]


def meet(ppo, kind: str, *names: str) -> None:
    """Let two roles' passes each wait until the other's have begun, on ranks of its own.

    One after the other they would wait in vain.
    """
    store = dist.distributed_c10d._get_default_store()

    def waiting(name: str, other: str, real):
        def at_work(*given):
            if ppo.stage.roles[name].parallel.is_member:
                store.set(f"{kind} {name}", "began")
                store.wait([f"{kind} {other}"], timedelta(seconds=MEET_S))
            return real(*given)

        return at_work

    for name, other in zip(names, reversed(names)):
        passes = ppo.stage.roles[name].passes
        setattr(passes, kind, waiting(name, other, getattr(passes, kind)))


def side_by_side(folder: Path, parallel: Parallel) -> list[str]:
    """What is done at the same time, where layouts have no rank in common."""
    layouts = CASES["learns on a half"].by_name | dict(ref_inf="tp1 on 4-7", rew_inf="tp2 on 0-3")
    ppo = make_ppo(folder, parallel, layouts=layouts, ppo_epochs=1)
    meet(ppo, "score", "reference", "reward")
    meet(ppo, "train", "policy", "value")
    ppo.iteration(NUMBER, prompts(), LR, VALUE_LR)
    return ["reference and reward", "policy and value"]


def main(folder: Path, out: Path) -> None:
    parallel = start(1, timeout=300)
    torch.set_num_threads(1)
    results = {}
    asked = sys.argv[3:] or [*CASES]
    for name in asked:
        began = time.perf_counter()
        results[name] = one_case(folder, parallel, CASES[name], CASES[name].by_name)
        results[name]["took"] = time.perf_counter() - began
        if parallel.is_main:
            print(name, flush=True)
    results["side by side"] = side_by_side(folder, parallel)
    if parallel.is_main:
        torch.save(results, out)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
