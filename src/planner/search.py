"""The layouts that there are for a job, and the best of those that fit.

For rows, every layout with every way to cut a step into micro-batches. For PPO, every layout of
each role and phase, on all ranks or on half of them: what a role takes depends on itself alone, so
that of its layouts only those stay that no other one beats in seconds and in bytes; these are put
together with those of the other roles.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch

from src.errors import UserError
from src.models.config import ModelConfig
from src.parallel.layout import Layout
from src.planner import memory
from src.planner.cost import Cost, slots_of
from src.planner.hardware import GB, Hardware
from src.planner.job import PPO, VERIFIER, Job
from src.planner.memory import Beside
from src.planner.work import MicroBatch, layers_forward, sizes_of
from src.trainer.budget import Budget

RECOMPUTE = ("none", "selective", "full")
MOST_STAGES = 64
LONG = 8192  # tokens of a row, from which on ranks may divide its tokens
CACHE_SHARES = (1, 2, 4, 8)  # parts that the rollouts of a model are generated in
COUNTS = 0.003  # a difference, of seconds or bytes, that is worth a layout of its own
BACKWARD = 0.6  # of a micro-batch's passes: what a GPU may sum gradients in


@dataclass(frozen=True)
class Plan:
    """How a job goes on a machine's ranks.

    layouts: by phase, as PPO's flags name them, else "model"; rows: of a micro-batch; slots:
    sequences generated at a time; seconds: of each phase; side_by_side: pairs of phases on ranks
    of their own; held: bytes by role and kind; beside: of each phase.
    """

    layouts: dict[str, Layout]
    rows: int
    recompute: str
    seconds: dict[str, float]
    held: dict[str, Mapping[str, float]]
    beside: dict[str, Beside]
    total: float
    bytes: float
    slots: int = 0
    side_by_side: tuple[tuple[str, str], ...] = ()


def best_plans(job: Job, hardware: Hardware, gpus: int, count: int) -> list[Plan]:
    """The quickest, the first first; none where nothing fits."""
    cost = Cost(hardware, job.dtype.itemsize)
    is_ppo = job.task == PPO
    plans = _ppo_plans(job, cost, gpus, 4 * count) if is_ppo else _row_plans(job, cost, gpus)
    # Of those that differ in which half of the ranks has what, one.
    found = {(plan.total, plan.bytes): plan for plan in plans}
    return heapq.nsmallest(count, found.values(), key=lambda plan: plan.total)


def check_something_fits(plans: list[Plan], job: Job, hardware: Hardware, gpus: int) -> None:
    """Raise UserError where there is no plan: with what the leanest layout would take."""
    if plans:
        return
    largest = max(job.models.values(), key=lambda config: config.n_layers * config.dim**2)
    layouts = list(layouts_on(largest, range(gpus), hardware, True))
    if job.task == PPO:
        has_rows = any(job.batch // job.mini_batches >= layout.dp for layout in layouts)
    else:
        has_rows = any(job.batch % layout.dp == 0 for layout in layouts)
    if not has_rows:
        of_step = f" in {job.mini_batches} minibatches" if job.task == PPO else ""
        raise UserError(
            f"--gpus {gpus} --batch {job.batch}{of_step}: no way to divide the model leaves each "
            "data-parallel rank as many rows; give another number of one of them"
        )
    budgets = [memory.held(largest, layout, job.dtype, True).total for layout in layouts]
    raise UserError(
        f"--gpus {gpus}: nothing fits the {hardware.memory / GB:.1f} GB of a rank; the largest "
        f"model alone, with gradients and optimizer, takes {min(budgets) / GB:.1f} GB of each at "
        f"least, and rows of {job.length:,} tokens come on top: give more ranks, a smaller model, "
        "or shorter rows"
    )


def layouts_on(
    config: ModelConfig, ranks: range, hardware: Hardware, trained: bool, cp: Iterable[int] = (1,)
) -> Iterator[Layout]:
    """Every way to divide a model over these ranks."""
    n, widest = len(ranks), min(hardware.per_node, config.n_heads)
    for tp, pp, context in itertools.product(_divisors(n), _divisors(n), cp):
        if tp > widest or n % (tp * pp * context) or pp > min(config.n_layers, MOST_STAGES):
            continue
        if context > 1 and (sizes_of(config, tp).q // config.head_dim) % context:
            continue
        if not all(hardware.is_within(rank, tp) for rank in ranks[::tp]):
            continue
        dp = n // (tp * pp * context)
        plain: dict[str, Any] = dict(dp=dp, pp=pp, tp=tp, cp=context, first=ranks.start)
        if not trained:
            yield Layout(**plain)
            continue
        zeros = (0,) if dp * context == 1 else (0, 1) if pp > 1 else (0, 1, 2, 3)
        stages = [vp for vp in (1, 2, 4) if vp == 1 or (pp > 1 and pp * vp <= config.n_layers)]
        for zero, vp, sp in itertools.product(zeros, stages, (False, True)[: 1 + (tp > 1)]):
            yield Layout(**plain, zero=zero, vp=vp, sp=sp)


class _Priced(Protocol):
    @property
    def price(self) -> tuple[float, ...]: ...


Priced = TypeVar("Priced", bound=_Priced)


# --- Rows -----------------------------------------------------------------------------------------


def _row_plans(job: Job, cost: Cost, gpus: int) -> Iterator[Plan]:
    config = job.models["model"]
    context = (1, 2, 4, 8) if job.length >= LONG else (1,)
    for layout in layouts_on(config, range(gpus), cost.hardware, True, context):
        if job.batch % layout.dp:
            continue
        for rows in _divisors(job.batch // layout.dp):
            for recompute in RECOMPUTE:
                plan = row_plan(job, cost, layout, rows, recompute)
                if plan.bytes <= cost.hardware.memory:
                    yield plan


def row_plan(job: Job, cost: Cost, layout: Layout, rows: int, recompute: str) -> Plan:
    """A step of supervised training in a layout. rows: of a micro-batch."""
    config = job.models["model"]
    n = job.batch // layout.dp // rows
    batch = job.micro_batch(rows)
    passes = cost.train(config, layout, n, batch, recompute)
    backward = passes / n * BACKWARD
    seconds = {"passes": passes, "update": cost.update(config, layout, backward)}
    budget = memory.held(config, layout, job.dtype, True)
    beside = memory.of_training(config, layout, job.dtype, n, batch, recompute, cost.hardware.kind)
    held: dict[str, Mapping[str, float]]
    held = {"model": {"weights": budget.weights, "optimizer": budget.optimizer}}
    total = budget.weights + budget.optimizer + beside.total
    of_phase = {"passes": beside}
    return Plan(
        {"model": layout}, rows, recompute, seconds, held, of_phase, sum(seconds.values()), total
    )


# --- PPO ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One role in its layouts.

    seconds, beside: by phase; phase: the one that may go on beside another role's, whose seconds
    are `own`; held: by kind; half: the ranks of that phase, 0 all, 1 and 2 half of them; halves:
    those of phases on others.
    """

    role: str
    layouts: dict[str, Layout]
    seconds: dict[str, float]
    phase: str
    half: int
    held: Mapping[str, float]
    beside: dict[str, Beside]
    halves: dict[str, int] = field(default_factory=dict)
    slots: int = 0

    @property
    def own(self) -> float:
        return self.seconds[self.phase]

    @property
    def others(self) -> float:
        return sum(self.seconds.values()) - self.own

    def bytes_on(self, half: int) -> tuple[float, float]:
        """(held, beside in the phase that takes most) on the lower or the upper half."""
        here = _meets(self.half, half)
        own = sum(self.held.values()) if here else 0.0
        phases = [b.total for name, b in self.beside.items() if _meets(self._half(name), half)]
        return own, max(phases, default=0.0)

    def _half(self, phase: str) -> int:
        return self.halves.get(phase, self.half)

    @cached_property
    def price(self) -> tuple[float, ...]:
        return self.own, self.others, *self.bytes_on(1), *self.bytes_on(2)


def _meets(half: int, other: int) -> bool:
    return half == 0 or half == other


def _ppo_plans(job: Job, cost: Cost, gpus: int, count: int) -> Iterator[Plan]:
    """Those among the `count` best so far, and more."""
    of_minibatch = max(1, job.batch // job.mini_batches)
    totals: list[float] = []  # of the best so far
    for rows in [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= of_minibatch]:
        for recompute in RECOMPUTE:
            options = options_of(job, cost, gpus, rows, recompute)
            bound = totals[-1] if len(totals) == count else math.inf
            if all(options.values()):
                for plan in _together(cost, options, rows, recompute, count, bound):
                    totals = sorted([*totals, plan.total])[:count]
                    yield plan


def options_of(
    job: Job, cost: Cost, gpus: int, rows: int, recompute: str
) -> dict[str, list[Option]]:
    """What each role may do: the options that no other one beats."""
    halves = {0: range(gpus)}
    if gpus % 2 == 0:
        halves |= {1: range(gpus // 2), 2: range(gpus // 2, gpus)}
    room = cost.hardware.memory

    def fits(option: Option) -> bool:
        _, _, held, beside, held_above, beside_above = option.price
        return max(held + beside, held_above + beside_above) <= room

    kept: dict[str, list[Option]] = {}
    for role, config in job.models.items():
        every: list[Option] = []
        if role in ("actor", "critic"):
            # Who trains takes all ranks, or the policy the lower half, the value model the upper.
            make = generating if role == "actor" else valuing
            for half in (0, 1 if role == "actor" else 2):
                if half not in halves:
                    continue
                trains = learning(job, cost, role, halves[half], rows, recompute)
                for other in {half, 0}:
                    seconds = _worth_moving_to(job, cost, role, halves[other], rows)
                    for train in trains:
                        # A value model may stay as it learns, whatever others take.
                        stays = role == "critic" and half == other
                        for second in {*seconds, *([plain_of(train.layout)] if stays else [])}:
                            every += make(job, cost, train, second, half, other, rows)
        else:
            for half, ranks in halves.items():
                for layout in _for_all(job, layouts_on(config, ranks, cost.hardware, False)):
                    every.append(frozen(job, cost, role, layout, half, rows))
        by_place: dict[tuple, list[Option]] = {}
        for option in every:
            if fits(option):
                by_place.setdefault((option.half, *option.halves.values()), []).append(option)
        kept[role] = [option for same in by_place.values() for option in undominated(same)]
    return kept


@dataclass(frozen=True)
class _Visited:
    """A layout that weights move to."""

    layout: Layout
    price: tuple[float, ...]


def _worth_moving_to(job: Job, cost: Cost, role: str, ranks: range, rows: int) -> list[Layout]:
    """Layouts to generate or to give values in that none beats in seconds and bytes."""
    every = _for_all(job, layouts_on(job.models[role], ranks, cost.hardware, False))
    if role == "actor":
        return [layout for layout in every if layout.pp == 1]
    found = []
    for layout in every:
        seconds, beside = scoring(job, cost, role, layout, rows, "copy")
        found.append(_Visited(layout, (seconds, beside.total)))
    return [each.layout for each in undominated(found)]


def _for_all(job: Job, layouts: Iterable[Layout]) -> list[Layout]:
    """Those whose every model has a rollout."""
    return [layout for layout in layouts if layout.models <= job.batch]


@dataclass(frozen=True)
class Learning:
    """A role that learns, in a layout: an iteration's optimizer steps."""

    layout: Layout
    seconds: float
    held: Budget
    beside: Beside

    @property
    def price(self) -> tuple[float, ...]:
        return self.seconds, self.held.weights + self.held.optimizer, self.beside.total


def learning(
    job: Job, cost: Cost, role: str, ranks: range, rows: int, recompute: str
) -> list[Learning]:
    """The layouts to learn in that none beats from which weights move alike."""
    alike: dict[tuple, list[Learning]] = {}
    for layout in layouts_on(job.models[role], ranks, cost.hardware, True):
        held = memory.held(job.models[role], layout, job.dtype, True)
        if job.batch // job.mini_batches >= layout.dp and held.total <= cost.hardware.memory:
            found = learns(job, cost, role, layout, rows, recompute)
            key = layout.tp, layout.pp, layout.vp, layout.zero >= 2
            alike.setdefault(key, []).append(found)
    return [each for same in alike.values() for each in undominated(same)]


@lru_cache(2**16)
def _scored(
    config: ModelConfig,
    cost: Cost,
    layout: Layout,
    dtype: torch.dtype,
    n: int,
    batch: MicroBatch,
    is_copy: bool,
) -> tuple[float, Beside]:
    beside = memory.of_scoring(config, layout, dtype, batch, cost.hardware.kind, is_copy)
    return cost.score(config, layout, n, batch), beside


def learns(job: Job, cost: Cost, role: str, layout: Layout, rows: int, recompute: str) -> Learning:
    """All of an iteration's optimizer steps of a role."""
    config = job.models[role]
    most = fullest(job.batch, job.mini_batches, layout.dp)
    n = math.ceil(most / rows)
    passes = cost.train(config, layout, n, job.micro_batch(most / n, role), recompute)
    step = passes + cost.update(config, layout, passes / n * BACKWARD)
    # Full micro-batches are what takes memory.
    full = max(1, int(most / rows)), job.micro_batch(min(rows, most), role)
    beside = memory.of_training(config, layout, job.dtype, *full, recompute, cost.hardware.kind)
    held = memory.held(config, layout, job.dtype, True)
    return Learning(layout, job.ppo_epochs * job.mini_batches * step, held, beside)


@lru_cache(2**10)
def fullest(batch: int, mini_batches: int, dp: int) -> float:
    """Rollouts of a minibatch that the model with most of them has, on average.

    Each minibatch is drawn from the rollouts of all models, that all have as many: so many of a
    model's are in it as chance will have it (hypergeometric; the highest of several as of normal
    numbers that sum to a constant, by Blom's formula).
    """
    of_all = batch / mini_batches
    mean = of_all / dp
    if dp == 1 or mini_batches == 1:
        return math.ceil(mean)
    variance = of_all * (1 / dp) * (1 - 1 / dp) * (batch - of_all) / max(batch - 1, 1)
    highest = NormalDist().inv_cdf((dp - 0.375) / (dp + 0.25)) * math.sqrt(dp / (dp - 1))
    return min(of_all, max(1.0, mean + highest * math.sqrt(variance)))


def scoring(
    job: Job,
    cost: Cost,
    role: str,
    layout: Layout,
    rows: int,
    how: Literal["frozen", "trained", "copy"] = "frozen",
) -> tuple[float, Beside]:
    """Seconds of a forward over all rollouts, and what it takes beside.

    how: "frozen"; or "trained", or a "copy" of what is, in the minibatches of the first epoch,
    which need not fill their micro-batches.
    """
    per_model = math.ceil(job.batch / layout.dp)
    n = math.ceil(per_model / rows)
    if how != "frozen":
        most = fullest(job.batch, job.mini_batches, layout.dp)
        least = 2 * per_model / job.mini_batches - most
        both = math.ceil(most / rows) + max(1, math.ceil(least / rows))
        n = max(n, job.mini_batches * both // 2)
    batch = job.micro_batch(per_model / n, role)
    plain = replace(layout, sp=False, zero=max(1, layout.zero))
    return _scored(job.models[role], cost, plain, job.dtype, n, batch, how == "copy")


def frozen(job: Job, cost: Cost, role: str, layout: Layout, half: int, rows: int) -> Option:
    """The reference, or the reward model."""
    phase = {"reference": "ref_inf", "reward": "rew_inf"}[role]
    seconds, beside = scoring(job, cost, role, layout, rows)
    weights = memory.held(job.models[role], layout, job.dtype, False).weights
    return Option(
        role, {phase: layout}, {phase: seconds}, phase, half, {"weights": weights}, {phase: beside}
    )


def generating(
    job: Job, cost: Cost, learns: Learning, gen: Layout, half: int, other: int, rows: int
) -> Iterator[Option]:
    """The policy: it generates (without stages), is scored, and learns."""
    config, dtype, train = job.models["actor"], job.dtype, learns.layout
    is_copy = is_other(train, gen)
    per_model, _ = generated_by_model(job.batch, job.samples_per_prompt, gen.dp)
    scores, at_scores = scoring(job, cost, "actor", train, rows, "trained")
    moved = {"relayout": _moved(cost, config, train, gen)} if is_copy else {}
    for slots in {slots_of(per_model, job.rollout_batch_size, share) for share in CACHE_SHARES}:
        generates, at_gen = _generated(job_key(job), config, cost, gen, dtype, slots, is_copy)
        yield Option(
            "actor",
            {"actor_train": train, "actor_gen": gen},
            {
                **moved,
                "actor_gen": generates,
                "logprobs": scores,
                "actor_train": learns.seconds,
            },
            "actor_train",
            half,
            {"weights": learns.held.weights, "optimizer": learns.held.optimizer},
            {"actor_gen": at_gen, "logprobs": at_scores, "actor_train": learns.beside},
            {"actor_gen": other},
            slots,
        )


def generated_by_model(batch: int, samples: int, dp: int) -> tuple[int, int]:
    """(rollouts of the fullest model, samples of a prompt that it generates).

    Prompts are dealt out with all of their samples, if there are enough (src/ppo/rollouts.py).
    """
    prompts = batch // samples
    if prompts >= dp:
        return samples * math.ceil(prompts / dp), samples
    return math.ceil(batch / dp), 1


def job_key(job: Job) -> tuple[int, ...]:
    """What generation must know of a job: rollouts, lengths, samples of a prompt."""
    return job.batch, job.prompt, job.response, job.longest, job.samples_per_prompt


@lru_cache(2**14)
def _generated(
    key: tuple[int, ...],
    config: ModelConfig,
    cost: Cost,
    gen: Layout,
    dtype: torch.dtype,
    slots: int,
    is_copy: bool,
) -> tuple[float, Beside]:
    batch, prompt, response, longest, samples = key
    per_model, samples = generated_by_model(batch, samples, gen.dp)
    seconds = cost.generate(config, gen, per_model, slots, prompt, response, samples)
    read = per_model / samples * prompt
    return seconds, memory.of_generation(
        config, gen, dtype, slots, prompt + longest, read, is_copy, cost.hardware.kind
    )


def _moved(cost: Cost, config: ModelConfig, source: Layout, target: Layout) -> float:
    """Seconds of a change of layout: sequence parallelism, and ZeRO's stages 0 and 1, are alike."""
    plain = replace(source, sp=False, zero=3 if source.zero >= 2 else 1)
    return _relaid(cost, config, plain, replace(target, zero=1))


@lru_cache(2**16)
def _relaid(cost: Cost, config: ModelConfig, source: Layout, target: Layout) -> float:
    return cost.relayout(config, source, target)


def valuing(
    job: Job, cost: Cost, learns: Learning, inf: Layout, half: int, other: int, rows: int
) -> Iterator[Option]:
    """The value model: it gives values, and learns."""
    config, train = job.models["critic"], learns.layout
    is_copy = not train.is_like(inf)
    inf = inf if is_copy else train
    values, at_values = scoring(job, cost, "critic", inf, rows, "copy" if is_copy else "trained")
    moved = {"value_relayout": _moved(cost, config, train, inf)} if is_copy else {}
    yield Option(
        "critic",
        {"critic_train": train, "critic_inf": inf},
        {**moved, "critic_inf": values, "critic_train": learns.seconds},
        "critic_train",
        half,
        {"weights": learns.held.weights, "optimizer": learns.held.optimizer},
        {"critic_inf": at_values, "critic_train": learns.beside},
        {"critic_inf": other},
    )


def plain_of(layout: Layout) -> Layout:
    """The same ranks for a model that is not trained."""
    return replace(layout, sp=False, zero=1, vp=1)


def is_other(train: Layout, gen: Layout) -> bool:
    """Whether generation takes a copy of the policy: the engine wants plain weights."""
    return not train.is_like(gen) or train.pp > 1 or (train.zero >= 2 and train.models > 1)


def undominated(options: list[Priced]) -> list[Priced]:
    """Those that no other one beats, by what counts, in all of seconds and bytes."""
    return [options[i] for i in _front(np.array([option.price for option in options]))]


def _front(prices: np.ndarray) -> list[int]:
    """Which rows of [options, prices] no other one beats in all of its prices."""
    front, kept = np.empty_like(prices), list[int]()
    for i in np.lexsort(prices.T[::-1]) if len(prices) else []:
        known = front[: len(kept)]
        if not (known <= prices[i] * (1 + COUNTS)).all(1).any():
            front[len(kept)] = prices[i]
            kept.append(int(i))
    return kept


PAIRS = (("actor", "critic"), ("reference", "reward"))  # roles that may work at the same time
APART = 2  # the product of the halves 1 and 2


def are_apart(options: Sequence[Option]) -> bool:
    """Whether two roles are on halves of their own."""
    return len(options) == 2 and math.prod(option.half for option in options) == APART


@dataclass(frozen=True)
class Team:
    """Options of the roles that may work at the same time: two, one, or none that there are.

    held, beside: bytes on the lower and on the upper half.
    """

    options: tuple[Option, ...]
    seconds: float
    held: tuple[float, float]
    beside: tuple[float, float]

    @property
    def price(self) -> tuple[float, ...]:
        return self.seconds, *self.held, *self.beside

    @classmethod
    def of(cls, options: tuple[Option, ...]) -> "Team":
        prices = [option.price for option in options]
        own = [price[0] for price in prices]
        seconds = sum(price[1] for price in prices)
        seconds += max(own) if are_apart(options) else sum(own)
        held = sum(price[2] for price in prices), sum(price[4] for price in prices)
        beside = (
            max((price[3] for price in prices), default=0.0),
            max((price[5] for price in prices), default=0.0),
        )
        return cls(options, seconds, held, beside)

    def fits(self, room: float) -> bool:
        return all(held + beside <= room for held, beside in zip(self.held, self.beside))


def _together(
    cost: Cost,
    options: dict[str, list[Option]],
    rows: int,
    recompute: str,
    count: int,
    bound: float,
) -> Iterator[Plan]:
    """The best few of all ways to put an option of each role together.

    bound: seconds that are reached already.
    """
    room = cost.hardware.memory
    of_pairs = [[options[name] for name in pair if name in options] for pair in PAIRS]
    sides = [_teams(lists, room, bound) for lists in of_pairs]
    if not all(sides):
        return
    # Each team of one pair with each of the other: [teams, teams].
    left, right = (np.array([team.price for team in side]) for side in sides)
    seconds = left[:, None, 0] + right[None, :, 0]
    for half in (0, 1):
        held = left[:, None, 1 + half] + right[None, :, 1 + half]
        beside = np.maximum(left[:, None, 3 + half], right[None, :, 3 + half])
        seconds[held + beside > room] = np.inf
    n = min(count, int((seconds < bound).sum()))
    for index in np.argpartition(seconds, n - 1, axis=None)[:n] if n else []:
        i, j = np.unravel_index(index, seconds.shape)
        chosen = {o.role: o for o in (*sides[0][i].options, *sides[1][j].options)}
        yield plan_of(chosen, rows, recompute)


def _teams(lists: list[list[Option]], room: float, bound: float) -> list[Team]:
    """One option of each list together: those that fit, are quick enough, and none beats."""
    if len(lists) < 2:
        return [team for team in map(Team.of, itertools.product(*lists)) if team.fits(room)]
    a, b = (np.array([option.price for option in options]) for options in lists)
    halves = [np.array([option.half for option in options]) for options in lists]
    own, others, *bytes_of = (np.broadcast_arrays(a[:, None, c], b[None, :, c]) for c in range(6))
    apart = np.multiply.outer(*halves) == APART
    seconds = sum(others) + np.where(apart, np.maximum(*own), sum(own))
    lower, beside, upper, beside_above = bytes_of
    columns = [seconds, sum(lower), sum(upper), np.maximum(*beside), np.maximum(*beside_above)]
    fits = (seconds < bound) & (
        np.maximum(columns[1] + columns[3], columns[2] + columns[4]) <= room
    )
    places = np.argwhere(fits)
    front = _front(np.stack([column[fits] for column in columns], 1))
    return [Team.of((lists[0][i], lists[1][j])) for i, j in places[front]]


def plan_of(chosen: dict[str, Option], rows: int, recompute: str) -> Plan:
    """The plan that one option of each role makes."""
    layouts: dict[str, Layout] = {}
    seconds: dict[str, float] = {}
    beside: dict[str, Beside] = {}
    for option in chosen.values():
        layouts |= option.layouts
        seconds |= option.seconds
        beside |= option.beside
    pairs, total = [], 0.0
    for names in PAIRS:
        options = tuple(chosen[name] for name in names if name in chosen)
        total += Team.of(options).seconds
        if are_apart(options):
            pairs.append((options[0].phase, options[1].phase))
    whole = Team.of(tuple(chosen.values()))
    most = max(held + beside for held, beside in zip(whole.held, whole.beside))
    return Plan(
        layouts,
        rows,
        recompute,
        seconds,
        {name: option.held for name, option in chosen.items()},
        beside,
        total,
        most,
        chosen["actor"].slots,
        tuple(pairs),
    )


# --- What is useful -------------------------------------------------------------------------------


def useful_flops(job: Job) -> float:
    """Operations of a step, or of an iteration, that the mathematics needs."""

    def forward(role: str, batch: MicroBatch) -> float:
        config = job.models[role]
        sizes = sizes_of(config, 1)
        work = layers_forward(config, sizes, batch, 1)
        head = 2 * sizes.head * batch.needed if config.head == "lm" else 0.0
        return work.products + work.attention + head

    if job.task != PPO:
        batch = job.micro_batch(job.batch)
        unseen = job.batch * job.response**2 * (job.task == VERIFIER)
        return 3 * forward("model", replace(batch, pairs=batch.pairs - unseen))
    flops = forward("actor", job.micro_batch(job.batch, "actor"))  # each token once, as generated
    for role in job.models:
        once = forward(role, job.micro_batch(job.batch, role))
        flops += once * (1 + 3 * job.ppo_epochs * (role in ("actor", "critic")))
    return flops


def _divisors(n: int) -> list[int]:
    low = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return low + [n // i for i in reversed(low) if i * i != n]
