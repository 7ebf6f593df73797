"""Sequences that are kept on disk: what they are, who makes them, and what becomes of damage."""

import functools
import json
import multiprocessing
import os
import random
import time

import numpy as np
import pytest

from src.data import kept as module
from src.data.kept import Joined, KeptSequences, Made, kept, lengths_of
from src.errors import UserError
from src.models.batch import Sequence


def rows(n=500, seed=0):
    rng = random.Random(seed)
    return [
        (rng.randrange(1, 9), [rng.randrange(9) for _ in range(rng.randrange(2, 40))])
        for _ in range(n)
    ]


def sequence_of(row):
    n, tokens = row
    return Sequence.of_spans(
        tokens, [(1, 2)] if n % 3 else [(1, 2), (len(tokens) - 1, len(tokens))]
    )


def make(chunk):
    made = Made(facts={"seen": (len(chunk), str(chunk[0][0]))})
    for row in chunk:
        made.add(sequence_of(row), str(row))
    return made


def failing(chunk):
    time.sleep(0.3)
    raise UserError("rows.jsonl:3: is wrong")


def ending(chunk):
    os._exit(9)


def nothing():
    pass


def as_lists(sequences):
    return [(list(s.tokens), s.ranges) for s in sequences]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_kept_is_what_was_made(tmp_path, workers):
    found = kept(tmp_path / "key", lambda: rows() + rows()[:7], make, nothing, workers)
    wanted = [sequence_of(row) for row in rows() + rows()[:7]]
    assert as_lists(found) == as_lists(wanted)
    assert lengths_of(found) == lengths_of(wanted)
    assert found.again == len(wanted) - len({str(row) for row in rows()})
    assert found.facts == {"seen": (507, str(rows()[0][0]))}
    few = found.only([i % 5 == 0 for i in range(507)])
    assert as_lists(few) == as_lists(wanted[::5]) and lengths_of(few) == lengths_of(wanted[::5])
    assert as_lists(few[3:9]) == as_lists(wanted[::5][3:9])
    both = Joined([few, found, wanted[:3]])
    assert as_lists(both) == as_lists([*wanted[::5], *wanted, *wanted[:3]])
    assert as_lists(both[-4:]) == as_lists([wanted[-1], *wanted[:3]])


def test_it_is_made_once(tmp_path):
    first = kept(tmp_path / "key", lambda: rows(9), make, nothing, 1)

    def not_again():
        raise AssertionError

    assert as_lists(kept(tmp_path / "key", not_again, make, nothing, 1)) == as_lists(first)


@pytest.mark.parametrize("damage", ["cut", "gone", "no index", "older"])
def test_what_is_not_whole_is_made_again(tmp_path, damage):
    wanted = as_lists(kept(tmp_path / "key", lambda: rows(9), make, nothing, 1))
    folder = tmp_path / "key"
    if damage == "cut":
        os.truncate(folder / "ids.bin", 8)
    elif damage == "older":
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(index | {"version": 0}))
    else:
        (folder / ("ends.bin" if damage == "gone" else "index.json")).unlink()
    assert as_lists(kept(folder, lambda: rows(9), make, nothing, 1)) == wanted
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def _ask(folder, results, work):
    try:
        results.put(len(kept(folder, lambda: rows(9), work, nothing, 1)))
    except UserError as error:
        results.put(str(error))


@pytest.mark.parametrize("work", [make, failing])
def test_of_several_processes_one_makes_it_and_all_hear_what_is_wrong(tmp_path, work):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    since = time.monotonic()
    processes = [
        context.Process(target=_ask, args=(tmp_path / "key", results, work)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert found == ({9} if work is make else {"rows.jsonl:3: is wrong"})
    assert time.monotonic() - since < 20
    if work is failing:  # and is asked again, not remembered
        assert len(kept(tmp_path / "key", lambda: rows(9), make, nothing, 1)) == 9


def test_what_is_wrong_in_a_worker_is_told(tmp_path):
    with pytest.raises(UserError, match="rows.jsonl:3: is wrong"):
        kept(tmp_path / "key", lambda: rows(200), failing, nothing, 2)
    assert not (tmp_path / "key").exists()


def test_what_ends_a_worker_or_keeps_from_writing_is_told(tmp_path):
    with pytest.raises(UserError, match="a process that makes it was ended from without"):
        kept(tmp_path / "key", lambda: rows(200), ending, nothing, 2)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/tokens: cannot be written: Not a directory; name"):
        kept(tmp_path / "file" / "tokens" / "key", lambda: rows(9), make, nothing, 1)


def test_nothing_at_all_is_kept_too(tmp_path):
    found = kept(tmp_path / "key", list, make, nothing, 1)
    assert len(found) == 0 and lengths_of(found) == ([], [])
    assert isinstance(found, KeptSequences) and isinstance(found._ids, np.ndarray)
    assert functools.reduce(lambda n, _: n + 1, found, 0) == 0
    assert module.usable_cores() >= 1
