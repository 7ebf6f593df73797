"""How far a run is, and how much time is left.

The time left is the work left times the seconds that work has taken so far, on the whole: of all
that has been tried a plain mean errs least. The first update, which warms everything up, is left
out of it, and what runs aside, such as an evaluation, is counted by itself.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"
# of what takes seconds or minutes: seconds for each, not each second
SLOW_FORMAT, SLOW = FORMAT.replace("rate", "rate_inv"), ("iteration",)
ENDLESS_FORMAT = "{desc}: {n_fmt}{unit} [{elapsed}, {rate_fmt}{postfix}]"  # of an unknown total
KNOWN = 0.1  # of the answers side by side must have ended before lengths are taken for known
# A text is taken to be the likelier to end the longer it is, by its length to a power one less
# than this shape of Weibull's law, which is known up to a factor before any has ended.
SHAPE, FACTOR = 1.5, 1.25
SHAPES = np.geomspace(0.5, 8, 41)
FINEST = 1024  # lengths are told apart, at most
FIXED = 64  # what a decode step takes however few sequences run: as if so many more did


class Progress(tqdm):
    """A tqdm bar (a context manager) that also shows tokens per second and sound time left."""

    def __init__(
        self,
        work: float | Callable[[], float] | None,
        show: Callable[["Progress", bool], None],
        is_bound: Callable[[], bool] = lambda: False,
        **style: Any,
    ) -> None:
        """work: what is left to do, in units that take the same time each.

        A function of what is left now, a number at the start, or by default the bar's own units;
        show(bar, ended): is called after each update and at the end; is_bound: whether what is left
        is at most that now, which the bar says, too.
        """
        self.tokens, self.show, self.is_bound = 0, show, is_bound
        total = style["total"]
        if work is None and total is not None:
            work = total - style["initial"]
        self.work, self.work_done = work, 0.0
        # Of the updates but the first: how many, their seconds and work.
        self.updates, self.seconds, self.counted = 0, 0.0, 0.0
        # What ran aside: its seconds, how often it ran, and will run.
        self.aside_seconds, self.aside_times, self.aside_left = 0.0, 0, 0
        self.since = 0.0  # the elapsed seconds at which the running unit would have begun
        form = SLOW_FORMAT if style.get("unit") in SLOW else FORMAT
        super().__init__(**style, bar_format=ENDLESS_FORMAT if total is None else form)

    def update(
        self, n: float | None = 1, tokens: int = 0, work: float | None = None, **shown: object
    ) -> None:
        """Advance by `n` units and `tokens` tokens; `shown` (loss=...) stands beside the bar.

        work: how much of the whole work that was, `n` by default; 0 is none, and takes no time that
        counts.
        """
        if self.disable:
            return
        elapsed, work = self.elapsed, float(n or 0) if work is None else work
        if work:
            self.updates += 1
            if self.updates == 2:  # now there is a better one than the first
                self.seconds, self.counted = 0.0, 0.0
            self.seconds += elapsed - self.since
        self.counted += work
        self.work_done += work
        self.since = elapsed
        self.tokens += tokens
        if self.tokens:
            shown["tokens/s"] = self.tokens / max(elapsed, 1e-9)
        self.set_postfix(shown, refresh=False)
        super().update(n)
        self.show(self, False)

    @contextmanager
    def aside(self, left: int) -> Iterator[None]:
        """Around what is not part of a unit; it will come `left` times more."""
        began = 0.0 if self.disable else self.elapsed
        try:
            yield
        finally:
            if not self.disable:
                took = self.elapsed - began
                self.since += took
                self._count_aside(took, 1, left)

    def add_aside(self, times: int, left: int) -> None:
        """What ran since the last update was aside, `times` at once; it will come `left` more."""
        if not self.disable:
            self._count_aside(self.elapsed - self.since, times, left)
            self.since = self.elapsed

    def _count_aside(self, seconds: float, times: int, left: int) -> None:
        self.aside_seconds += seconds
        self.aside_times += times
        self.aside_left = left

    def close(self) -> None:
        """End the bar; the second time nothing happens."""
        if not self.disable:
            self.show(self, True)
        super().close()

    @property
    def elapsed(self) -> float:
        """Seconds since the bar began."""
        return self._time() - self.start_t

    @property
    def seconds_left(self) -> float | None:
        """None as long as nothing can be said."""
        if self.work is None or not self.counted:
            return None
        left = self.work() if callable(self.work) else self.work - self.work_done
        aside = self.aside_left * self.aside_seconds / max(1, self.aside_times)
        return max(0.0, left) * self.seconds / self.counted + aside

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm formats, with the time left."""
        seconds = self.seconds_left
        bound = "≤" if seconds and self.is_bound() else ""
        left = "?" if seconds is None else bound + self.format_interval(seconds)
        return {**super().format_dict, "left": left}


class AnswerLengths:
    """How much there is still to generate, of answers whose lengths nobody knows beforehand.

    Lengths are taken to be distributed as those of the answers so far, by the estimator of Kaplan
    and Meier (1958): of those that still run it is known that they are longer. Lengths that none
    has come to follow Weibull's law, of the likeliest shape.
    """

    def __init__(self, n: int, limit: int, ranks: int = 1) -> None:
        """n: answers; limit: tokens of one, at most; ranks: that share them."""
        self.waiting, self.slots, self.ranks = n, 0, ranks
        self.unit = max(1, -(-limit // FINEST))  # tokens
        self.limit = max(2, -(-limit // self.unit))  # of one, in units
        self.ended: Counter[int] = Counter()  # answers of each length
        self.running: Counter[int] = Counter()  # answers that have so many tokens so far
        self.tokens = 0

    def step(self, ended: list[int], running: list[int]) -> tuple[int, int, float]:
        """After a forward: the lengths of what ended in it, and of what runs so far.

        Returns its new tokens, how many prompts it took in, and the work that it was, in tokens at
        full slots: 0 where it took in prompts, which is work of another kind.
        """
        side_by_side = len(ended) + len(running)
        answers = self.ended.total() + self.running.total()
        self.ended.update(ended)
        self.running = Counter(running)
        self.slots = max(self.slots, side_by_side)
        taken_in = self.ended.total() + self.running.total() - answers
        self.waiting -= taken_in
        before, self.tokens = self.tokens, _tokens(self.ended) + _tokens(self.running)
        new = self.tokens - before
        return new, taken_in, 0.0 if taken_in else self._work(1, new)

    def _work(self, steps: float, tokens: float) -> float:
        fixed = FIXED * self.ranks
        return self.slots * (fixed * steps + tokens) / (fixed + self.slots)

    @property
    def are_unknown(self) -> bool:
        """Whether hardly any answer has ended yet."""
        return self.ended.total() < KNOWN * self.slots

    def work_left(self) -> float:
        """In tokens at full slots; what waits fills slots as they get free.

        While lengths are unknown, as much as it can be: all answers are cut off.
        """
        longer = np.ones(self.limit) if self.are_unknown else self.survival().clip(min=1e-9)
        # beyond[m]: what an answer has beyond its first m, on average over all, in units.
        beyond = np.append(longer[::-1].cumsum()[::-1], 0.0)[: self.limit]
        counts = self._counts(self.running)[: self.limit]
        ages = counts.nonzero()[0]
        counts = counts[ages]
        if self.waiting > 0:
            # When the last that waits begins, the others are anywhere in theirs.
            last = beyond / beyond[0]
            tokens = self.waiting * beyond[0] + (counts * beyond[ages] / longer[ages]).sum()
            full = max(0.0, tokens - self.slots * last.sum())
            all_ended = (1 - last) ** self.slots
        else:
            # [ages, tokens from now on]: how likely each still runs then
            padded = np.append(longer, np.zeros(self.limit))
            still = np.array([padded[age : age + self.limit] / padded[age] for age in ages])
            full, last = 0.0, counts @ still / self.slots
            all_ended = ((1 - still) ** counts[:, None]).prod(0)
        return self.unit * (full + self._work((1 - all_ended).sum(), self.slots * last.sum()))

    def survival(self) -> np.ndarray:
        """How likely an answer is longer than 0, 1, … units, [limit]."""
        ended, running = self._counts(self.ended), self._counts(self.running)
        # How many were seen to come to each length, and what share of them ended there. One answer
        # is added that ends as likely as the law says: it stands for lengths that none has come to.
        came = (ended + running)[::-1].cumsum()[::-1]
        share = (ended + _weibull(ended, ended + running)) / (came + 1)
        return (1 - share[: self.limit]).cumprod()

    def _counts(self, lengths: Counter[int]) -> np.ndarray:
        """How many there are of each length in units, [limit + 1]."""
        counts = np.zeros(self.limit + 1, dtype=int)
        for length, count in lengths.items():
            counts[min(-(-length // self.unit), self.limit)] += count
        return counts


def _weibull(ended: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """How likely what came to each length ends there, by the likeliest law of Weibull, [limit + 1].

    seen: how many were last seen at each length; ended: how many of them by themselves, but for
    those at the limit, which were cut off.
    """
    limit = len(seen) - 1
    lengths = np.arange(limit + 1) / limit
    n_ended = max(1e-9, float(ended[:-1].sum()))
    # The rate that is the likeliest for each shape, and how likely the two are.
    rates = n_ended / (seen * lengths ** SHAPES[:, None]).sum(1).clip(min=1e-9)
    logs = (ended[1:-1] * np.log(lengths[1:-1])).sum()
    likely = n_ended * np.log(SHAPES * rates) + (SHAPES - 1) * logs
    likely -= (np.log(SHAPES / SHAPE) / np.log(FACTOR)) ** 2 / 2
    best = likely.argmax()
    return np.append(0.0, -np.expm1(-rates[best] * np.diff(lengths ** SHAPES[best])))


def _tokens(lengths: Counter[int]) -> int:
    return sum(length * count for length, count in lengths.items())
