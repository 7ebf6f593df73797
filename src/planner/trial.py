"""Small real cases, on the ranks that started this: the trainers' own code, with random weights.

    torchrun --nproc_per_node N -m src.planner.trial REQUEST.json OUT.json

REQUEST.json: {"folder": …, "rates": whether the machine is measured, "cases": [Case as a dict, …]};
OUT.json: {"rates": …, "cases": [seconds by phase, of the slowest rank, the median of some turns;
bytes of the fullest rank]}.
"""

import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from src.data.encoding import Comparison, Prompt
from src.generation.from_settings import sampling_of
from src.models.batch import Sequence
from src.models.config import ModelConfig
from src.models.transformer import Transformer
from src.parallel.layout import Layout
from src.parallel.setup import Parallel, reuse_memory, start, stop
from src.parallel.sharding import own
from src.planner.calibrate import measured_rates
from src.planner.job import PPO, VERIFIER
from src.planner.measure import (
    llama_of,
    meet,
    most_allocated,
    most_of_ranks,
    random_folder,
    role_of,
    some_sequences,
    timed,
)
from src.ppo.assembly import engine_of
from src.ppo.kl import KLController
from src.ppo.layouts import Layouts
from src.ppo.rewards.verifier import VerifierReward
from src.ppo.roles import Stage
from src.ppo.setup import ADAM_EPSILON
from src.ppo.trainer import PPO as Trainer
from src.settings.declaration import build
from src.settings.ppo import LayoutSettings, PPOSettings
from src.trainer.optimizer import Optimizer
from src.trainer.passes import passes_of
from src.trainer.solver import SolverObjective
from src.trainer.verifier import VerifierObjective

PHASES = {  # of PPO's log, by what the planner calls them
    "generate": "actor_gen",
    "reward": "rew_inf",
    "logprobs": "logprobs",
    "ref_logprobs": "ref_inf",
    "values": "critic_inf",
    "update_policy": "actor_train",
    "update_value": "critic_train",
}
LR = 1e-6


@dataclass(frozen=True)
class Case:
    """A job in a layout. sizes: of the model, as `ModelConfig` has them; layouts: as flags say."""

    task: str
    sizes: dict[str, int]
    layouts: dict[str, str]
    batch: int
    prompt: int
    response: int
    rows: int
    recompute: str = "none"
    turns: int = 3
    more: dict[str, Any] = field(default_factory=dict)  # settings of PPO
    memory: bool = True

    @property
    def config(self) -> ModelConfig:
        """A Llama."""
        return llama_of(self.sizes)

    @property
    def settings(self) -> PPOSettings:
        """PPO's, with responses of one length."""
        lengths = dict(max_new_tokens=self.response, min_new_tokens=self.response)
        sizes = dict(max_batch_size=self.rows, max_buffer_size=self.batch)
        longest = self.prompt + self.response
        given = lengths | sizes | dict(max_seq_len=longest, log_samples=0)
        return build(PPOSettings, given | self.more)

    def in_layouts(self, ranks: int) -> Layouts:
        """PPO's, by phase: those that are not given as the script has them."""
        return Layouts.of(LayoutSettings(**self.layouts), self.settings.run, self.batch, ranks)


def weights_of(model: Transformer) -> int:
    return sum(own(p).nbytes for p in model.parameters())


def averages_of(optimizer: Optimizer) -> int:
    return sum(x.nbytes for x in optimizer.state_tensors())


# --- Rows -----------------------------------------------------------------------------------------


def rows_of(folder: Path, case: Case, parallel: Parallel) -> dict:
    """Steps on rows: SFT, or a verifier's pairs."""
    layout = Layout.parsed(case.layouts["model"], parallel.world_size, "model", 1)
    division = parallel.laid_out(layout)
    head = "score" if case.task == VERIFIER else "lm"
    role = role_of(folder, "model", head, division, case.recompute)
    model, optimizer = role.model, role.optimizer
    assert optimizer is not None
    count, seed = case.batch // layout.dp, division.data_rank
    sequences = some_sequences(
        count * (2 if case.task == VERIFIER else 1), case.prompt, case.response, 1024, seed
    )
    objective: Any
    if case.task == VERIFIER:
        sides = zip(sequences[:count], sequences[count:])
        objective = VerifierObjective([pair_of(*both) for both in sides], division.device)
    else:
        objective = SolverObjective(sequences, division.device)
    turns = [[*range(i, min(i + case.rows, count))] for i in range(0, count, case.rows)]
    passes = passes_of(model, division, optimizer)
    denominator = float(case.batch * case.response)

    def train() -> None:
        passes.train(turns, objective.batch, lambda i: objective.loss(model, i, denominator)[0])
        optimizer.backward_done()

    def step() -> None:
        train()
        optimizer.step(LR)

    with division.active():
        step()  # makes the averages
        seconds: dict[str, list[float]] = {"passes": [], "update": []}
        for _ in range(case.turns):
            seconds["passes"].append(timed(train))
            seconds["update"].append(timed(lambda: optimizer.step(LR)))
        figures = {"weights": weights_of(model), "optimizer": averages_of(optimizer)}
        if case.memory:
            figures["beside"] = most_allocated(step)
    figures["all"] = sum(figures.values())
    return result(seconds, figures)


def pair_of(chosen: Sequence, other: Sequence) -> Comparison:
    """Two responses to the first one's prompt."""
    n = chosen.prompt_length
    rejected = Sequence([*chosen.tokens[:n], *other.tokens[n:]], n)
    return Comparison([chosen, rejected], [(0, 1)])


# --- PPO ------------------------------------------------------------------------------------------


def ppo_of(folder: Path, case: Case, parallel: Parallel) -> dict:
    """Iterations of the four roles."""
    settings, layouts = case.settings, case.in_layouts(parallel.world_size)
    parallel = parallel.laid_out(layouts.actor_train)
    stage = Stage(False, parallel.device)
    for name, head, layout, recompute in (
        ("policy", "lm", layouts.actor_train, case.recompute),
        ("value", "score", layouts.critic_train, case.recompute),
        ("reference", "lm", layouts.ref_inf, None),
        ("reward", "score", layouts.rew_inf, None),
    ):
        division = parallel.laid_out(layout)
        stage.add(role_of(folder, name, head, division, recompute, eps=ADAM_EPSILON))
    stays = layouts.critic_inf.is_like(layouts.critic_train)
    trainer = Trainer(
        stage,
        [(1.0, VerifierReward(stage.roles["reward"], parallel, case.rows))],
        engine_of(settings, layouts, stage, parallel),
        sampling_of(settings.generation, settings.run.seed),
        set(),
        KLController(0.1),
        settings,
        parallel,
        values_in=None if stays else layouts.critic_inf,
    )
    samples = settings.rollouts.samples_per_prompt
    of_prompts = some_sequences(
        case.batch // samples, case.prompt, case.response, case.config.vocab_size, 7
    )
    prompts = [Prompt(list(s.tokens[: case.prompt])) for s in of_prompts for _ in range(samples)]

    def iterate(number: int) -> dict[str, float]:
        meet()
        began = time.perf_counter()
        stats = trainer.iteration(number, prompts, LR, LR)
        meet()
        return {**stats, "seconds": time.perf_counter() - began}

    iterate(0)  # makes the averages
    seconds: dict[str, list[float]] = {}
    for number in range(1, case.turns + 1):
        stats = iterate(number)
        of_phases = {
            name: stats[f"seconds/{key}"]
            for key, name in PHASES.items()
            if f"seconds/{key}" in stats  # else beside another one
        }
        for moved in ("relayout", "value_relayout"):
            of_phases[moved] = stats.get(f"seconds/{moved}", 0.0)
        # Each is a part of the phase that it is for.
        of_phases["actor_gen"] -= of_phases["relayout"]
        of_phases["critic_inf"] -= of_phases["value_relayout"]
        of_phases["total"] = stats["seconds"]
        for name, x in of_phases.items():
            seconds.setdefault(name, []).append(x)
    figures = {
        "weights": sum(weights_of(role.model) for role in stage.roles.values()),
        "optimizer": sum(averages_of(optimizer) for _, optimizer in stage.trained().values()),
    }
    if case.memory:
        figures["beside"] = most_allocated(lambda: iterate(case.turns + 1))
    figures["all"] = sum(figures.values())
    return result(seconds, figures)


def result(seconds: dict[str, list[float]], figures: dict[str, int]) -> dict:
    """Medians of the seconds, of the slowest rank; bytes of the fullest."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "seconds": {name: most_of_ranks(x) for name, x in medians.items()},
        "bytes": {name: most_of_ranks(x) for name, x in figures.items()},
    }


def run_case(folder: Path, case: Case, parallel: Parallel) -> dict:
    """Measure it; a collective of all ranks."""
    name = "-".join(str(x) for x in case.sizes.values())
    if parallel.is_main:
        random_folder(folder / name, case.config)
    dist.barrier()
    run = ppo_of if case.task == PPO else rows_of
    found = run(folder / name, case, parallel)
    gc.collect()
    return found


def main(request: Path, out: Path) -> None:
    asked = json.loads(request.read_text())
    parallel = start(1, timeout=600)
    if parallel.device.type == "cpu":
        reuse_memory()
    folder = Path(asked["folder"])
    results: dict[str, Any] = {"cases": []}
    if asked.get("rates"):
        results["rates"] = measured_rates(folder, parallel)
    for given in asked["cases"]:
        results["cases"].append(run_case(folder, Case(**given), parallel))
        if parallel.is_main:
            print(f"{len(results['cases'])} of {len(asked['cases'])} cases", file=sys.stderr)
    if parallel.is_main:
        out.write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
