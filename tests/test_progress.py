"""src/progress.py: the time left, on a clock set by hand, against what it then really is."""

import random
from collections.abc import Iterator

import numpy as np
import pytest

from src.logs import RunLog
from src.progress import AnswerLengths


@pytest.fixture
def clock(monkeypatch):
    """The seconds that bars and the log see, [now]."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("src.logs.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def log():
    with RunLog(None, "run", {}, rank=0) as log:
        yield log


def error_after_a_tenth(said: list[tuple[float, float | None]], end: float) -> float:
    """Of the first time left after a tenth of all seconds; said: (seconds, time left)."""
    at, left = next(moment for moment in said if moment[0] >= end / 10)
    assert left is not None
    return left / (end - at) - 1


def training(log, clock, steps: list[tuple[int, float]], every: int, evaluation: float) -> float:
    """The error of a bar over steps of so many tokens and seconds, with evaluations between."""
    total, said = len(steps), []
    to_come = total // every
    work = sum(tokens for tokens, _ in steps)
    with log.progress(total, "train", unit="step", work=work) as bar:
        with bar.aside(left=to_come):
            clock[0] += evaluation
        for number, (tokens, seconds) in enumerate(steps, 1):
            clock[0] += seconds
            bar.update(1, tokens=tokens, work=tokens)
            said.append((clock[0], bar.seconds_left))
            if number % every == 0:
                to_come -= 1
                with bar.aside(left=to_come):
                    clock[0] += evaluation
    assert to_come == 0
    return error_after_a_tenth(said, clock[0])


def test_time_left_of_steps_of_unlike_lengths_with_a_slow_first_and_evaluations(log, clock):
    rng = random.Random(0)
    lengths = [rng.randint(20, 400) for _ in range(200)]
    # The first step compiles for as long as ten others take; evaluations take a third of all.
    steps = [(n, 0.01 * n + (20 if i == 0 else 0)) for i, n in enumerate(lengths)]
    assert abs(training(log, clock, steps, every=50, evaluation=40.0)) < 0.05


def test_time_left_by_work_where_the_long_comes_first(log, clock):
    lengths = sorted((random.Random(1).randint(10, 1000) for _ in range(300)), reverse=True)
    steps = [(n, 0.01 * n) for n in lengths]
    assert abs(training(log, clock, steps, every=1000, evaluation=0.0)) < 0.01


def test_time_left_is_the_mean_whatever_was_last(log, clock):
    """Not that of the last few steps."""
    steps = [(1, 10.0 if i % 10 == 9 else 1.0) for i in range(400)]
    assert abs(training(log, clock, steps, every=1000, evaluation=0.0)) < 0.1


def test_time_left_is_unknown_at_first_and_nothing_at_the_end(log, clock):
    with log.progress(4, "train", initial=2) as bar:
        assert bar.seconds_left is None and "?" in str(bar)
        clock[0] += 3
        bar.update(1)
        assert bar.seconds_left == 3.0 and "<00:03" in str(bar)
        clock[0] += 5
        bar.update(1)
        assert bar.seconds_left == 0.0


def served(lengths: list[int], slots: int) -> Iterator[tuple[float, list[int], list[int]]]:
    """What an engine tells after each forward, and the seconds that it took.

    As many answers as there are slots run side by side; a free slot takes the next at once.
    """
    waiting, running = list(lengths), []  # running: [length, tokens so far]
    while waiting or running:
        free = slots - len(running)
        if waiting and free:
            news, waiting = waiting[:free], waiting[free:]
            running += [[length, 1] for length in news]
            seconds = 0.05 + 0.01 * len(news)
        else:
            seconds = 0.05 + 0.001 * len(running)
            for answer in running:
                answer[1] += 1
        ended = [tokens for length, tokens in running if tokens >= length]
        running = [answer for answer in running if answer[1] < answer[0]]
        yield seconds, ended, [tokens for _, tokens in running]


def drawn(kind: str, n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    draw = {
        "lognormal": lambda: rng.lognormvariate(4.3, 0.5),
        "all alike": lambda: rng.gauss(100, 20),
        "many cut off": lambda: 256 if rng.random() < 0.3 else rng.lognormvariate(4.0, 0.4),
        "all cut off": lambda: 256,
    }[kind]
    return [min(256, max(1, round(draw()))) for _ in range(n)]


@pytest.mark.parametrize("kind", ["lognormal", "all alike", "many cut off", "all cut off"])
def test_time_left_of_answers_that_end_at_unlike_lengths(log, clock, kind):
    errors = []
    for seed in range(5):
        clock[0], said = 0.0, []
        lengths = drawn(kind, 400, seed)
        known = AnswerLengths(len(lengths), 256)
        with log.progress(len(lengths), "generating", work=known.work_left) as bar:
            for seconds, ended, running in served(lengths, 16):
                clock[0] += seconds
                tokens, taken_in, work = known.step(ended, running)
                if taken_in:
                    bar.add_aside(taken_in, left=known.waiting)
                bar.update(len(ended), tokens=tokens, work=work)
                said.append((clock[0], bar.seconds_left))
            assert bar.tokens == sum(lengths) and bar.n == len(lengths) and known.waiting == 0
            assert bar.seconds_left == 0.0
        errors.append(abs(error_after_a_tenth(said, clock[0])))
    assert sorted(errors)[2] < 0.15 and max(errors) < 0.3, errors


def test_how_likely_an_answer_is_longer():
    """By hand, where nothing has to be guessed: many answers, some of which still run."""
    known = AnswerLengths(4000, limit=4)
    known.step([1] * 1000 + [2] * 1000, [2] * 1000 + [3] * 1000)
    # 4000 came to one token, 1000 ended there; 3000 came to two, 1000 ended; 1000 to three, none.
    longer = known.survival()
    assert longer.tolist() == pytest.approx([1, 3 / 4, 3 / 4 * 2 / 3, 3 / 4 * 2 / 3], rel=2e-3)


def test_when_all_so_far_were_cut_off_the_others_are_taken_to_be():
    known = AnswerLengths(40, limit=10)
    assert known.step([], [1, 1]) == (2, 2, 0.0)
    assert known.step([], [2, 2]) == (2, 0, 2.0)
    # Nobody knows: two have 8 tokens to go, 38 wait, 396 at most, two at a time.
    assert known.are_unknown and known.work_left() == pytest.approx(396, rel=0.02)
    for tokens in range(3, 10):
        known.step([], [tokens] * 2)
    known.step([10, 10], [])
    # 38 wait: 380 tokens two at a time.
    assert known.work_left() == pytest.approx(380, rel=0.02)


@pytest.mark.parametrize("shape", [1.0, 2.5, 5.0])
def test_what_none_has_come_to_goes_on_as_it_began(shape):
    """Of 2000 answers by Weibull's law, seen when three tenths have ended."""
    limit, rng = 400, np.random.default_rng(0)
    lengths = np.ceil(100 * rng.weibull(shape, 2000)).astype(int).clip(1, limit)
    now = int(np.quantile(lengths, 0.3))
    known = AnswerLengths(len(lengths), limit)
    known.step(lengths[lengths < now].tolist(), [now] * int((lengths >= now).sum()))
    assert known.survival().sum() == pytest.approx(lengths.mean(), rel=0.15)


@pytest.mark.parametrize("waiting", [0, 500])
def test_long_limits_are_told_apart_as_finely_as_it_takes(waiting):
    """The same answers, 32 times as long, are 32 times the work."""
    rng, works = np.random.default_rng(1), []
    lengths = np.ceil(300 * rng.weibull(2, 400)).astype(int).clip(1, 1024)
    for longer in (1, 32):
        known = AnswerLengths(len(lengths) + waiting, limit=1024 * longer)
        ended = [n * longer for n in lengths if n < 300]
        known.step(ended, [300 * longer] * (len(lengths) - len(ended)))
        works.append(known.work_left())
    assert works[1] == pytest.approx(32 * works[0], rel=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("limit", [1, 2, 1025])
def test_odd_numbers_of_tokens_are_no_trouble(limit):
    known = AnswerLengths(8, limit)
    for ended, running in (([0] * 4, []), ([], [1]), ([limit], [1, 1]), ([limit] * 2, [])):
        known.step(ended, running)
        assert known.work_left() >= 0


def test_a_shape_is_not_taken_from_a_handful_of_answers():
    """Three that end at nearly one length: half of the others are longer all the same."""
    known = AnswerLengths(30, limit=100)
    known.step([19, 20, 21], [21] * 27)
    assert known.survival()[30] > 0.5


@pytest.mark.parametrize("slots, ranks", [(64, 1), (640, 1), (640, 10)])
def test_a_step_of_few_takes_a_share_of_a_full_one_s_time_that_the_slots_decide(slots, ranks):
    known = AnswerLengths(slots, limit=1000, ranks=ranks)
    known.step([], [1] * slots)
    known.step([2] * slots, [])
    full = 64 * ranks + slots
    assert known._work(1, slots) == pytest.approx(slots)
    assert known._work(1, 1) / slots == pytest.approx((64 * ranks + 1) / full)


def test_as_long_as_hardly_any_has_ended_the_most_is_told(log, clock):
    """All as long as the limit; the bar says that it is at most that."""
    known = AnswerLengths(20, limit=10)
    with log.progress(
        20, "generating", work=known.work_left, is_bound=lambda: known.are_unknown
    ) as bar:
        clock[0] += 1.0
        _, taken_in, _ = known.step([], [1] * 20)
        bar.add_aside(taken_in, left=0)
        clock[0] += 2.0
        _, _, work = known.step([], [2] * 20)
        bar.update(0, work=work)
        assert bar.seconds_left == pytest.approx(16.0) and "<≤00:16" in str(bar)
        clock[0] += 2.0
        _, _, work = known.step([3, 3], [3] * 18)
        bar.update(2, work=work)
        assert bar.seconds_left < 14 and "≤" not in str(bar)
