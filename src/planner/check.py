"""How right the planner is: small real cases on this machine, beside what it says of them.

First the machine is measured, at each number of ranks; then every case is predicted and run. And of
a few jobs all candidates are run, to see whether the one that would be named is the quickest.
"""

import itertools
from dataclasses import asdict, dataclass, field
from operator import itemgetter

import torch

from src.parallel.layout import Layout
from src.planner.calibrate import hardware_from, launched, ranks_here
from src.planner.cost import Cost
from src.planner.hardware import GB, Hardware
from src.planner.job import PPO, SFT, VERIFIER, Job
from src.planner.measure import sizes_by_name
from src.planner.report import table
from src.planner.search import (
    Plan,
    frozen,
    generating,
    learns,
    plan_of,
    row_plan,
    valuing,
)
from src.planner.trial import Case

SIZES = {  # of models, by device: a small one, and a wide one
    "cpu": (
        sizes_by_name(384, 6, 6, 6, 1024, 4096),
        sizes_by_name(640, 4, 10, 10, 1728, 8192),
    ),
    "cuda": (
        sizes_by_name(1536, 12, 12, 12, 4096, 8192),
        sizes_by_name(2560, 8, 20, 20, 6912, 16384),
    ),
}
SMALL, WIDE = SIZES["cuda" if torch.cuda.is_available() else "cpu"]
SHORT = dict(ppo_epochs=1, mini_batches=2)
BYTES_OFF, SECONDS_OFF, BEST_OFF = 0.05, 0.25, 1.1  # how far off is right


def _apart(ranks: int) -> dict[str, str]:
    """The reference on one half of the ranks, the reward model on the other."""
    half = ranks // 2
    lower, upper = (f"dp{half} on {first}-{first + half - 1}" for first in (0, half))
    return dict(ref_inf=lower, rew_inf=upper)


def cases_on(ranks: int) -> list[Case]:
    """What is run at one number of ranks: layouts, sizes, tasks."""
    n = ranks

    def ppo(sizes: dict, rows: int, **layouts: str) -> Case:
        return Case(PPO, sizes, layouts, 16 * n, 64, 48, rows, more=SHORT)

    if n == 1:
        one = dict(model="dp1")
        return [
            Case(SFT, SMALL, one, 8, 96, 64, 4),
            Case(SFT, WIDE, one, 8, 64, 192, 4, "full"),
            Case(VERIFIER, SMALL, one, 8, 96, 64, 4),
            ppo(SMALL, 8, actor_train="dp1"),
        ]
    dp, tp, pp = (f"{degree}{n}" for degree in ("dp", "tp", "pp"))
    cases = [
        Case(SFT, SMALL, dict(model=dp), 8 * n, 96, 64, 4),
        Case(SFT, WIDE, dict(model=tp), 8, 64, 192, 4),
        Case(SFT, WIDE, dict(model=f"{tp} sp"), 8, 64, 192, 4, "selective"),
        Case(SFT, SMALL, dict(model=pp), 8 * n, 96, 64, 2),
        Case(SFT, WIDE, dict(model=f"{dp} zero3"), 8 * n, 64, 192, 4),
        Case(SFT, WIDE, dict(model=f"{dp} zero2"), 4 * n, 64, 192, 4),
        Case(VERIFIER, WIDE, dict(model=tp), 8, 96, 64, 4),
        Case(VERIFIER, SMALL, dict(model=f"{pp} vp2"), 8 * n, 96, 64, 2),
        ppo(SMALL, 8, actor_train=dp),
        ppo(WIDE, 8, actor_train=tp, actor_gen=dp),
        ppo(SMALL, 4, actor_train=tp, actor_gen=dp, critic_train=pp, **_apart(n)),
        ppo(
            WIDE,
            8,
            actor_train=f"{dp} zero3",
            actor_gen=tp,
            critic_train=dp,
            critic_inf=tp,
            ref_inf=tp,
        ),
    ]
    return [case for case in cases if has_layers(case, n)]


def jobs_on(ranks: int) -> dict[str, list[Case]]:
    """Small jobs, each with all candidates."""
    n, apart = ranks, _apart(ranks)
    texts = [f"dp{n} zero{z}" for z in range(4)] + [f"tp{n}", f"tp{n} sp", f"pp{n}", f"pp{n} vp2"]

    def of_rows(task: str, sizes: dict, lengths: tuple[int, int, int], rows: int) -> list[Case]:
        """lengths: rows of a step, tokens of a prompt, of a response."""
        return [
            Case(task, sizes, dict(model=text), *lengths, rows, turns=3, memory=False)
            for text in texts
        ]

    def of_ppo(sizes: dict, lengths: tuple[int, int, int]) -> list[Case]:
        divisions, cases = (f"dp{n}", f"tp{n}"), []
        for train, gen, where in itertools.product((*divisions, f"pp{n}"), divisions, ({}, apart)):
            layouts = dict(actor_train=train, actor_gen=gen, critic_train=train) | where
            case = Case(PPO, sizes, layouts, *lengths, 4, turns=2, more=SHORT, memory=False)
            cases.append(case)
        return cases

    jobs = {
        "sft, short rows": of_rows(SFT, SMALL, (2 * n, 32, 32), 1),
        "sft, twice the rows": of_rows(SFT, SMALL, (4 * n, 96, 64), 2),
        "sft, wide, long rows": of_rows(SFT, WIDE, (2 * n, 64, 192), 1),
        "verifier, wide": of_rows(VERIFIER, WIDE, (2 * n, 96, 64), 1),
        "ppo": of_ppo(SMALL, (8 * n, 48, 32)),
        "ppo, wide": of_ppo(WIDE, (4 * n, 96, 32)),
    }
    return {name: [case for case in cases if has_layers(case, n)] for name, cases in jobs.items()}


def has_layers(case: Case, ranks: int) -> bool:
    """Whether there is a layer for each stage."""
    layouts = [Layout.parsed(text, ranks, "case") for text in case.layouts.values()]
    return all(layout.pp * layout.vp <= case.config.n_layers for layout in layouts)


def job_for(case: Case, dtype: torch.dtype) -> Job:
    config, head = case.config, "score" if case.task == VERIFIER else "lm"
    score = config.with_head("score")
    models = {"model": config.with_head(head)}
    if case.task == PPO:
        models = {"actor": config, "critic": score, "reference": config, "reward": score}
    more = {k: v for k, v in case.more.items() if k in ("ppo_epochs", "mini_batches")}
    lengths = case.prompt, case.response, case.response
    return Job(case.task, models, dtype, case.batch, *lengths, **more)


def predicted(case: Case, hardware: Hardware, ranks: int) -> Plan:
    """What the planner says of a case."""
    job, cost = job_for(case, hardware.dtype), Cost(hardware, hardware.dtype.itemsize)
    rows, recompute = case.rows, case.recompute
    if case.task != PPO:
        layout = Layout.parsed(case.layouts["model"], ranks, "model", 1)
        return row_plan(job, cost, layout, rows, recompute)
    layouts = case.in_layouts(ranks)
    policy = learns(job, cost, "actor", layouts.actor_train, rows, recompute)
    value = learns(job, cost, "critic", layouts.critic_train, rows, recompute)
    # All of a model's rollouts at a time; the frozen roles side by side, if they can be.
    policies = generating(job, cost, policy, layouts.actor_gen, 0, 0, rows)
    halves = (0, 0) if layouts.ref_inf.overlaps(layouts.rew_inf) else (1, 2)
    chosen = {
        "actor": max(policies, key=lambda option: option.slots),
        "critic": next(valuing(job, cost, value, layouts.critic_inf, 0, 0, rows)),
        "reference": frozen(job, cost, "reference", layouts.ref_inf, halves[0], rows),
        "reward": frozen(job, cost, "reward", layouts.rew_inf, halves[1], rows),
    }
    return plan_of(chosen, rows, recompute)


def compared(plan: Plan, found: dict) -> list[tuple[str, float, float]]:
    """(phase, predicted, measured) seconds."""
    seconds = dict(plan.seconds)
    for a, b in plan.side_by_side:  # measured as one
        seconds[b] = max(seconds.pop(a), seconds[b])
    phases = [(name, guess, found["seconds"][name]) for name, guess in seconds.items()]
    return [*phases, ("total", plan.total, _total(found))]


@dataclass
class Tally:
    """What is printed of the cases and of the jobs, and how many of them are right."""

    rows: list[tuple[str, ...]] = field(
        default_factory=lambda: [("case", "GB", "", "", "phase", "seconds", "", "")]
    )
    named: list[tuple[str, ...]] = field(
        default_factory=lambda: [("job", "named", "seconds", "quickest", "seconds", "ratio")]
    )
    bytes: list[bool] = field(default_factory=list)
    phases: list[bool] = field(default_factory=list)
    both: list[bool] = field(default_factory=list)
    best: list[bool] = field(default_factory=list)

    def add_case(self, case: Case, ranks: int, plan: Plan, found: dict) -> None:
        """A row for each phase, and the bytes beside the first."""
        there = found["bytes"]["all"]
        off = plan.bytes / there - 1
        figures = f"{plan.bytes / GB:.4f}", f"{there / GB:.4f}", f"{off:+.1%}"
        head: tuple[str, ...] = (_described(case, ranks), *figures)
        self.bytes.append(abs(off) <= BYTES_OFF)
        in_time = []
        for name, guess, took in compared(plan, found):
            off = guess / took - 1
            self.rows.append((*head, name, f"{guess:.3f}", f"{took:.3f}", f"{off:+.0%}"))
            head = ("", "", "", "")
            in_time.append(abs(off) <= SECONDS_OFF)
        self.phases += in_time
        self.both.append(self.bytes[-1] and all(in_time))

    def add_job(self, name: str, tried: list[tuple[float, float, Case]]) -> None:
        """tried: predicted and measured seconds of each candidate."""
        (_, chosen, named), (_, least, quickest) = (min(tried, key=itemgetter(i)) for i in (0, 1))
        row = _layouts(named), f"{chosen:.3f}", _layouts(quickest), f"{least:.3f}"
        self.named.append((name, *row, f"{chosen / least:.2f}"))
        self.best.append(chosen <= BEST_OFF * least)

    def lines(self) -> list[str]:
        lines = ["predicted, measured, off by:", *table(self.rows), ""]
        lines += [
            f"bytes of {sum(self.bytes)} of {len(self.bytes)} cases within {BYTES_OFF:.0%}, "
            f"{sum(self.phases)} of {len(self.phases)} phases within {SECONDS_OFF:.0%}: both of "
            f"{sum(self.both)} cases"
        ]
        if self.best:
            lines += ["", *table(self.named)]
            share = f"{sum(self.best)} of {len(self.best)} jobs"
            lines += [f"{share}: the named layout within {BEST_OFF - 1:.0%} of the quickest"]
        return lines


def check(gpus: int | None) -> None:
    """Print the tables: one of the cases, one of the jobs."""
    tally = Tally()
    for ranks in sorted({1, gpus or ranks_here()}):
        cases, jobs = cases_on(ranks), jobs_on(ranks) if ranks > 1 else {}
        every = [*cases, *itertools.chain.from_iterable(jobs.values())]
        results = launched(ranks, [asdict(case) for case in every], rates=True)
        hardware, found = hardware_from(results["rates"]), iter(results["cases"])
        for case in cases:
            tally.add_case(case, ranks, predicted(case, hardware, ranks), next(found))
        for name, candidates in jobs.items():
            totals = [predicted(case, hardware, ranks).total for case in candidates]
            took = [_total(next(found)) for _ in candidates]
            tally.add_job(name, [*zip(totals, took, candidates)])
    print("\n".join(tally.lines()))


def _total(found: dict) -> float:
    seconds = found["seconds"]
    return seconds["total"] if "total" in seconds else sum(seconds.values())


def _described(case: Case, ranks: int) -> str:
    size = "small" if case.sizes == SMALL else "wide"
    recompute = "" if case.recompute == "none" else f", {case.recompute}"
    return f"{case.task} {size}{recompute}, {ranks} ranks: {_layouts(case)}"


def _layouts(case: Case) -> str:
    if "model" in case.layouts:
        return f"{case.layouts['model']}, {case.rows} rows"
    return ", ".join(f"{name} {text}" for name, text in case.layouts.items())
