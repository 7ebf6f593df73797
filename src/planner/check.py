"""How right the planner is: small real cases on this machine, beside what it says of them.

First the machine is measured, at each number of ranks; then every case is predicted and run. And of
a few jobs all candidates are run, to see whether the one that would be named is the quickest.
"""

import itertools
from dataclasses import asdict

import torch

from src.parallel.layout import Layout
from src.planner.calibrate import hardware_from, launched, ranks_here
from src.planner.cost import Cost, slots_of
from src.planner.hardware import GB, Hardware
from src.planner.job import PPO, SFT, VERIFIER, Job
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

SIZES = {  # of models, by device
    "cpu": {
        "small": (384, 6, 6, 6, 1024, 4096),
        "wide": (640, 4, 10, 10, 1728, 8192),
    },
    "cuda": {
        "small": (1536, 12, 12, 12, 4096, 8192),
        "wide": (2560, 8, 20, 20, 6912, 16384),
    },
}
FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size")
KIND = "cuda" if torch.cuda.is_available() else "cpu"
SMALL, WIDE = (dict(zip(FIELDS, sizes)) for sizes in SIZES[KIND].values())
SHORT = dict(ppo_epochs=1, mini_batches=2)


def _apart(ranks: int) -> dict[str, str]:
    """The reference on one half of the ranks, the reward model on the other."""
    half = ranks // 2
    lower, upper = (f"dp{half} on {first}-{first + half - 1}" for first in (0, half))
    return dict(ref_inf=lower, rew_inf=upper)


def cases_on(ranks: int) -> list[Case]:
    """What is run at one number of ranks: layouts, sizes, tasks."""
    n = ranks
    if n == 1:
        one = dict(model="dp1")
        return [
            Case(SFT, SMALL, one, 8, 96, 64, 4),
            Case(SFT, WIDE, one, 8, 64, 192, 4, "full"),
            Case(VERIFIER, SMALL, one, 8, 96, 64, 4),
            Case(
                PPO, SMALL, dict(actor_train="dp1", critic_train="dp1"), 16, 64, 48, 8, more=SHORT
            ),
        ]
    cases = [
        Case(SFT, SMALL, dict(model=f"dp{n}"), 8 * n, 96, 64, 4),
        Case(SFT, WIDE, dict(model=f"tp{n}"), 8, 64, 192, 4),
        Case(SFT, WIDE, dict(model=f"tp{n} sp"), 8, 64, 192, 4, "selective"),
        Case(SFT, SMALL, dict(model=f"pp{n}"), 8 * n, 96, 64, 2),
        Case(SFT, WIDE, dict(model=f"dp{n} zero3"), 8 * n, 64, 192, 4),
        Case(SFT, WIDE, dict(model=f"dp{n} zero2"), 4 * n, 64, 192, 4),
        Case(VERIFIER, WIDE, dict(model=f"tp{n}"), 8, 96, 64, 4),
        Case(VERIFIER, SMALL, dict(model=f"pp{n} vp2"), 8 * n, 96, 64, 2),
        Case(
            PPO,
            SMALL,
            dict(actor_train=f"dp{n}", critic_train=f"dp{n}"),
            16 * n,
            64,
            48,
            8,
            more=SHORT,
        ),
        Case(
            PPO,
            WIDE,
            dict(actor_train=f"tp{n}", actor_gen=f"dp{n}", critic_train=f"tp{n}"),
            16 * n,
            64,
            48,
            8,
            more=SHORT,
        ),
        Case(
            PPO,
            SMALL,
            dict(actor_train=f"tp{n}", actor_gen=f"dp{n}", critic_train=f"pp{n}") | _apart(n),
            16 * n,
            64,
            48,
            4,
            more=SHORT,
        ),
        Case(
            PPO,
            WIDE,
            dict(
                actor_train=f"dp{n} zero3",
                actor_gen=f"tp{n}",
                critic_train=f"dp{n}",
                critic_inf=f"tp{n}",
                ref_inf=f"tp{n}",
            ),
            16 * n,
            64,
            48,
            8,
            more=SHORT,
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


def cost_on(hardware: Hardware) -> Cost:
    """In the numbers that cases are computed in."""
    return Cost(hardware, 4 if hardware.kind == "cpu" else 2)


def predicted(case: Case, cost: Cost, ranks: int) -> Plan:
    """What the planner says of a case."""
    dtype = torch.float32 if cost.hardware.kind == "cpu" else torch.bfloat16
    job = job_for(case, dtype)
    if case.task != PPO:
        layout = Layout.parsed(case.layouts["model"], ranks, "model", 1)
        return row_plan(job, cost, layout, case.rows, case.recompute)
    train, critic = case.layout("actor_train", ranks), case.layout("critic_train", ranks)
    gen = case.layout("actor_gen", ranks, "actor_train")
    inf = case.layout("critic_inf", ranks, "critic_train")
    everything = job, cost
    policy = learns(*everything, "actor", train, case.rows, case.recompute)
    value = learns(*everything, "critic", critic, case.rows, case.recompute)
    per_model = -(-case.batch // gen.dp)
    slots = slots_of(per_model, job.rollout_batch_size, 1)
    chosen = {
        "actor": next(
            option
            for option in generating(*everything, policy, gen, 0, 0, case.rows)
            if option.slots == slots
        ),
        "critic": next(valuing(*everything, value, inf, 0, 0, case.rows)),
    }
    where = {}
    for role, phase in (("reference", "ref_inf"), ("reward", "rew_inf")):
        where[role] = case.layout(phase, ranks, "actor_train")
    apart = not where["reference"].overlaps(where["reward"])
    for number, (role, layout) in enumerate(where.items(), 1):
        half = number if apart else 0
        chosen[role] = frozen(*everything, role, layout, half, case.rows)
    return plan_of(job, chosen, case.rows, case.recompute)


def compared(case: Case, plan: Plan, found: dict) -> list[tuple[str, float, float]]:
    """(phase, predicted, measured) seconds."""
    seconds = dict(plan.seconds)
    for a, b in plan.side_by_side:  # measured as one
        seconds[b] = max(seconds.pop(a), seconds[b])
    seconds["total"] = plan.total
    measured = dict(found["seconds"])
    if "total" not in measured:
        measured["total"] = sum(measured.values())
    return [(name, x, measured[name]) for name, x in seconds.items()]


def check(gpus: int | None) -> None:
    """Print the tables: one of the cases, one of the jobs."""
    most = gpus or ranks_here()
    rows: list[tuple[str, ...]] = [("case", "GB", "", "", "phase", "seconds", "", "")]
    right = right_bytes = total = phases = right_phases = 0
    named: list[tuple[str, ...]] = [("job", "named", "seconds", "quickest", "seconds", "ratio")]
    best = 0
    for ranks in sorted({1, most}):
        cases = cases_on(ranks)
        jobs = jobs_on(ranks) if ranks > 1 else {}
        every = [*cases, *itertools.chain.from_iterable(jobs.values())]
        results = launched(ranks, [asdict(case) for case in every], rates=True)
        cost = cost_on(hardware_from(results["rates"]))
        found = iter(results["cases"])
        for case in cases:
            result, plan = next(found), predicted(case, cost, ranks)
            bytes_there, of_phases = result["bytes"]["all"], compared(case, plan, result)
            off_bytes = plan.bytes / bytes_there - 1
            is_right = abs(off_bytes) <= 0.05
            right_bytes += is_right
            head: tuple[str, ...] = (
                _described(case, ranks),
                f"{plan.bytes / GB:.4f}",
                f"{bytes_there / GB:.4f}",
                f"{off_bytes:+.1%}",
            )
            for name, guess, took in of_phases:
                off = guess / took - 1 if took else 0.0
                rows.append((*head, name, f"{guess:.3f}", f"{took:.3f}", f"{off:+.0%}"))
                head = ("", "", "", "")
                phases, right_phases = phases + 1, right_phases + (abs(off) <= 0.25)
                is_right &= abs(off) <= 0.25
            total, right = total + 1, right + is_right
        for name, candidates in jobs.items():
            tried = [
                (predicted(case, cost, ranks).total, _total(next(found)), case)
                for case in candidates
            ]
            chosen, quickest = min(tried, key=lambda x: x[0]), min(tried, key=lambda x: x[1])
            ratio = chosen[1] / quickest[1]
            best += ratio <= 1.1
            named.append(
                (
                    name,
                    _layouts(chosen[2]),
                    f"{chosen[1]:.3f}",
                    _layouts(quickest[2]),
                    f"{quickest[1]:.3f}",
                    f"{ratio:.2f}",
                )
            )
    lines = ["predicted, measured, off by:", *table(rows), ""]
    lines += [
        f"bytes of {right_bytes} of {total} cases within 5 %, {right_phases} of {phases} phases "
        f"within 25 %: both of {right} cases",
        "",
    ]
    if len(named) > 1:
        lines += table(named)
        lines += [f"{best} of {len(named) - 1} jobs: the named layout within 10 % of the quickest"]
    print("\n".join(lines))


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
