"""What is logged of an iteration: its meaning, name by name, is in docs/ppo.md."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from src.parallel.clock import clock
from src.parallel.setup import Parallel
from src.ppo.buffer import RolloutBuffer
from src.ppo.roles import Stage
from src.trainer.meter import peak_memory


class Timer:
    """Seconds of each phase of an iteration."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """A new iteration begins."""
        self.began, self.seconds = time.perf_counter(), dict[str, float]()

    @property
    def elapsed(self) -> float:
        """Since the iteration began."""
        return time.perf_counter() - self.began

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what happens inside as part of a phase."""
        clock.announce(phase)
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def reward_statistics(
    sums: dict[str, float], kept: int | None, parallel: Parallel
) -> dict[str, float]:
    """Means over all that was generated, what was left out included.

    sums: this rank's, and under known/NAME how many numbers are in the sum NAME; "rollouts" among
    them; kept: rollouts of all ranks that were kept, None when no group is ever left out.
    """
    total = over_models(sums, parallel)
    count = total["rollouts"]
    known = {n.removeprefix("known/"): x for n, x in total.items() if n.startswith("known/")}
    means = {name: total[name] / max(x, 1) for name, x in known.items()}
    silent = {name: 1 - known[name] / count for name in means if name.startswith("reward")}
    return {
        **{name: means.pop(name) for name in silent},
        **{name.replace("reward", "no_opinion"): share for name, share in silent.items() if share},
        **means,
        **({} if kept is None else {"kept": kept / count}),
    }


def rollout_statistics(
    buffer: RolloutBuffer, parallel: Parallel, is_comparable: bool
) -> dict[str, float]:
    """Means over all ranks' rollouts. KL: unclipped, per response (mean) and per token (max).

    is_comparable: whether sampling and scoring have the same distribution, so that decoding's drift
    shows by itself.
    """
    has_reference, has_value = buffer.ref_logprobs is not None, buffer.values is not None
    sums = {
        "truncated": buffer.truncated,
        "shaped_reward": buffer.shaped,
        "entropy": buffer.entropy,
    }
    highs = {}
    if is_comparable:
        highs["logprob_drift"] = (buffer.logprobs - buffer.rollout_logprobs).abs()
    if has_reference:
        sums["kl"] = highs["kl_max"] = buffer.logprobs - buffer.ref_logprobs
    if has_value:
        returns, residuals = buffer.returns.double(), (buffer.returns - buffer.values).double()
        sums |= {"values": buffer.values, "returns": buffer.returns, "returns²": returns.square()}
        sums |= {"residuals": residuals, "residuals²": residuals.square()}

    total = over_models({name: float(x.double().sum()) for name, x in sums.items()}, parallel)
    highest = {name: float(x.max()) if len(x) else -torch.inf for name, x in highs.items()}
    most = over_models(highest, parallel, dist.ReduceOp.MAX)

    sequences, tokens = len(buffer.lengths_of_all), sum(buffer.lengths_of_all)
    per_sequence, per_token = ("shaped_reward", "truncated", "kl"), ("entropy", "values", "returns")
    statistics = {
        **{name: total[name] / sequences for name in per_sequence if name in total},
        **{name: total[name] / tokens for name in per_token if name in total},
        **most,
        "response_length": tokens / sequences,
    }
    if has_value:
        variance = total["returns²"] / tokens - (total["returns"] / tokens) ** 2
        unexplained = total["residuals²"] / tokens - (total["residuals"] / tokens) ** 2
        explained = 1 - unexplained / variance if variance > 0 else 0.0
        statistics["explained_variance"] = explained
    return statistics


def costs(
    timer: Timer,
    tokens: int,
    ppo_epochs: int,
    stage: Stage,
    parallel: Parallel,
    sent: dict[str, int],
) -> dict[str, float]:
    """Seconds and tokens/s of each phase, and memory: of the slowest, and of the fullest rank.

    tokens: of all responses; sent: bytes by this rank in each change of layout.
    """
    passes = {"generate": 1, "update": ppo_epochs}
    phases = {"generate": ("generate",), "update": ("update_policy", "update_value")}
    # Roles may be on ranks of their own: no rank takes part in all phases.
    memory = {f"memory_gb/{name}": size / 1e9 for name, size in stage.peak.items()}
    memory["memory_gb"] = peak_memory(parallel.device) / 1e9
    most = over_ranks({**timer.seconds, **memory}, parallel, dist.ReduceOp.MAX)
    seconds = {phase: most[phase] for phase in timer.seconds}
    spent = {
        name: sum(seconds.get(phase, 0.0) for phase in parts) for name, parts in phases.items()
    }
    all_sent = over_ranks({f"gb/{name}": n / 1e9 for name, n in sent.items()}, parallel)
    return {
        "seconds": timer.elapsed,
        **{f"seconds/{phase}": took for phase, took in seconds.items()},
        **{f"tokens_per_s/{n}": tokens * passes[n] / took for n, took in spent.items() if took},
        **{name: most[name] for name in memory},
        **all_sent,
    }


def over_models(
    local: dict[str, float], parallel: Parallel, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> dict[str, float]:
    """Numbers of each model of a division, put together and the same on all ranks of the run.

    The ranks of a model have the same.
    """
    nothing = 0.0 if op == dist.ReduceOp.SUM else -torch.inf
    own = local if parallel.speaks else dict.fromkeys(local, nothing)
    return over_ranks(own, parallel, op)


def over_ranks(
    local: dict[str, float], parallel: Parallel, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> dict[str, float]:
    """Numbers of each rank of the run, by the same names, put together."""
    names = sorted(local)
    values = torch.tensor([local[n] for n in names], dtype=torch.float64, device=parallel.device)
    dist.all_reduce(values, op=op)
    return dict(zip(names, values.tolist()))
