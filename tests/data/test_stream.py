"""The order of tokens: each once in an epoch, blends in their shares, places found at once.

The reference is plain Python on the documents as lists.
"""

import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from src.checkpoint.manifest import described
from src.data.rows import write_json
from src.data.shards import Shards, Writer, names_of
from src.data.stream import Blended, Stream, permuted
from src.trainer.batches import EpochSteps, StreamSteps, epoch_batches


def write_shards(folder: Path, documents: list[list[int]], shard_tokens: int = 50) -> Path:
    """Finished shards of given ids."""
    folder.mkdir(parents=True)
    writer = Writer(folder, np.dtype("<u2"), shard_tokens)
    for ids in documents:
        writer.append(ids, True)
    shards = writer.finish()
    names = [name for number in range(len(shards)) for name in names_of(number)]
    index = {
        "format": 1,
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "dtype": "<u2",
        "tokenizer": "a",
        "vocabulary": "b",
        "shards": [{"tokens": tokens, "documents": count} for tokens, count in shards],
        "files": {name: described(folder / name) for name in names},
    }
    write_json(folder / "index.json", index)
    return folder


def documents_of(count: int, first: int = 0) -> list[list[int]]:
    """Documents of 2 to 12 tokens, no token twice."""
    ids, documents = iter(range(first, 2**16)), []
    for number in range(count):
        documents.append([next(ids) for _ in range(2 + number * 7 % 11)])
    return documents


@pytest.fixture
def documents() -> list[list[int]]:
    return documents_of(40)


@pytest.mark.parametrize("max_seq_len", [2, 3, 10, 32, 1000])
def test_each_token_but_a_documents_first_is_predicted_once_in_an_epoch(
    tmp_path, documents, max_seq_len
):
    stream = Stream.open(str(write_shards(tmp_path / "a", documents)), max_seq_len)
    for epoch in range(3):
        predicted: Counter[tuple[int, int]] = Counter()
        for number in range(stream.rows * epoch, stream.rows * (epoch + 1)):
            spans = stream.spans(number)
            assert sum(map(len, spans)) <= max_seq_len
            if not spans:
                continue
            batch = stream.batch(spans, torch.device("cpu"))
            predicted.update(zip(batch.tokens[batch.rows].tolist(), batch.targets.tolist()))
        pairs = [pair for ids in documents for pair in zip(ids, ids[1:])]
        assert predicted == Counter(pairs)


@pytest.mark.parametrize("max_seq_len", [2, 10, 1000])
def test_across_documents_each_token_but_the_first_is(tmp_path, documents, max_seq_len):
    stream = Stream.open(str(write_shards(tmp_path / "a", documents)), max_seq_len, False)
    predicted: Counter[tuple[int, int]] = Counter()
    for number in range(stream.rows):
        (span,) = stream.spans(number)
        batch = stream.batch([span], torch.device("cpu"))
        assert batch.whole.positions.tolist() == list(range(len(span)))
        predicted.update(zip(batch.tokens[batch.rows].tolist(), batch.targets.tolist()))
    whole = [i for ids in documents for i in ids]
    assert predicted == Counter(zip(whole, whole[1:]))


def test_documents_of_a_row_see_themselves_alone(tmp_path, documents):
    stream = Stream.open(str(write_shards(tmp_path / "a", documents)), 30)
    for number in range(stream.rows):
        batch = stream.batch(stream.spans(number), torch.device("cpu"))
        for ids in batch.tokens.split(batch.whole.lengths):
            owner = next(d for d in documents if ids[0] in d)
            first = owner.index(ids[0])  # a document that a row cuts begins anew there
            assert ids.tolist() == owner[first : first + len(ids)]


def test_blends_have_their_shares_at_every_moment(tmp_path):
    folders = [
        write_shards(tmp_path / name, documents_of(count))
        for name, count in (("a", 30), ("b", 80), ("c", 10))
    ]
    text = ",".join(f"{folder}:{weight}" for folder, weight in zip(folders, ("0.7", "0.2", "0.1")))
    stream = Stream.open(text, 8)
    counts, rows = [0, 0, 0], [Counter(), Counter(), Counter()]
    for number in range(3000):
        part, row, epoch = stream.place(number)
        counts[part] += 1
        rows[part][row] += 1
        for i, share in enumerate((0.7, 0.2, 0.1)):
            assert abs(counts[i] - share * (number + 1)) <= 1 + i
    for i in range(3):  # before a row comes again, all others have come
        assert set(rows[i]) == set(range(stream.rows_of[i]))
        assert max(rows[i].values()) - min(rows[i].values()) <= 1


def test_without_weights_an_epoch_has_each_row_once(tmp_path):
    folders = [
        str(write_shards(tmp_path / name, documents_of(count)))
        for name, count in (("a", 30), ("b", 83), ("c", 11))
    ]
    stream = Stream.open(",".join(folders), 8)
    for epoch in range(2):
        places = [stream.place(stream.rows * epoch + i) for i in range(stream.rows)]
        assert {place[2] for place in places} == {epoch}
        every = {(part, row) for part in range(3) for row in range(stream.rows_of[part])}
        assert {place[:2] for place in places} == every


def test_the_order_is_of_the_seed_and_another_in_each_epoch(tmp_path, documents):
    folder = str(write_shards(tmp_path / "a", documents))
    orders = [
        [stream.place(first + i)[1] for i in range(stream.rows)]
        for seed in (0, 0, 1)
        for stream in [Stream.open(folder, 8, seed=seed)]
        for first in (0, stream.rows)
    ]
    assert orders[:2] == orders[2:4]
    assert len({tuple(order) for order in orders}) == 4
    # no order to speak of: neighbours are as far apart as in shuffled lists, n / 3
    distances = np.abs(np.diff(orders[0]))
    assert 0.2 < distances.mean() / len(orders[0]) < 0.47


def test_permutations_are_permutations():
    for size in (*range(1, 70), 1000):
        assert sorted(permuted(i, size, "a") for i in range(size)) == list(range(size))


def test_any_place_is_found_at_once(tmp_path, documents):
    shards = Shards.open(write_shards(tmp_path / "a", documents))

    class Huge(Stream):
        rows_of = [10**12, 10**11]

    stream = Huge([Blended(shards, Fraction(7, 10)), Blended(shards, Fraction(3, 10))], 8, True, 0)
    began = time.process_time()
    places = {stream.place(10**11 + i) for i in range(1000)}
    assert len(places) == 1000
    assert time.process_time() - began < 2


def test_steps_take_the_next_rows_up_to_the_last_of_all_epochs():
    steps = StreamSteps(n_rows=21, batch_size=8, epochs=2)
    assert (steps.in_epoch, steps.total) == (3, 6)
    rows = [row for step in range(steps.total) for row in steps.batch(step)]
    assert rows == list(range(42))
    assert StreamSteps(21, 8, 1, most=5).batch(4) == list(range(32, 40))


def test_rows_of_a_list_come_as_they_came_before():
    steps = EpochSteps(10, 4, epochs=3, seed=5)
    whole = [batch for epoch in (1, 2, 3) for batch in epoch_batches(10, 4, 5, epoch)]
    assert [steps.batch(step) for step in range(steps.total)] == whole
    assert steps.batch(4) == whole[4]  # also backwards
