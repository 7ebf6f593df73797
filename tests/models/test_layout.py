"""How tensors are divided at any degree, against lists of heads dealt out by hand.

Also the released shards' shapes.
"""

import pytest
import torch

from src.models.config import ModelConfig
from src.models.hf_config import PRESETS
from src.models.layout import TensorSpec, layer_table, tensor_table

UNIT = 2  # rows of a head
DEGREES = (*range(1, 10), 12, 16, 17)
# heads, kv heads
ATTENTION = ((8, 8), (52, 52), (28, 4), (64, 8), (32, 8), (16, 8), (6, 3), (9, 3), (6, 2))
ATTENTION += ((5, 1), (4, 1), (2, 2), (1, 1), (40, 40))


def dealt(heads: int, kv_heads: int, n: int) -> list[tuple[list[int], list[int]]]:
    """Every rank's query heads and kv heads.

    Whole kv heads while there are enough, else several ranks to one of them.
    """
    bounds = [kv * heads // kv_heads for kv in range(kv_heads + 1)]
    group = [list(range(bounds[kv], bounds[kv + 1])) for kv in range(kv_heads)]
    if n <= kv_heads:
        most = -(-kv_heads // n)
        kvs_of = [[kv for kv in range(kv_heads) if kv // most == rank] for rank in range(n)]
        return [(sum((group[kv] for kv in kvs), []), kvs) for kvs in kvs_of]
    ranks = []
    for kv in range(kv_heads):
        sharing = n // kv_heads
        most = -(-len(group[kv]) // sharing)
        for turn in range(sharing):
            ranks.append(([head for i, head in enumerate(group[kv]) if i // most == turn], [kv]))
    return ranks + [([], [])] * (n - len(ranks))


def rows_of(blocks: list[int], size: int, unit: int) -> torch.Tensor:
    """Numbered rows (from 1) of these blocks, and zeros up to `size`."""
    rows = [1 + block * unit + row for block in blocks for row in range(unit)]
    return torch.tensor(rows + [0] * (size - len(rows)))


def check(spec: TensorSpec, held: list[list[int]], n: int) -> None:
    """Numbered rows go through cut, owners, copies and join.

    held: the blocks that each rank should hold.
    """
    count = spec.shape[spec.dim] // spec.unit
    whole = torch.arange(1, count * spec.unit + 1).expand(3, -1).movedim(-1, spec.dim).contiguous()
    size = max(len(blocks) for blocks in held) * spec.unit
    parts = [spec.cut(whole, rank, n) for rank in range(n)]
    for rank, part in enumerate(parts):
        wanted = rows_of(held[rank], size, spec.unit).expand(3, -1).movedim(-1, spec.dim)
        assert torch.equal(part, wanted), (rank, part, wanted)
        assert tuple(part.shape) == spec.local_shape(n)
        start, stop = spec.local_range(rank, n)
        numbers = rows_of(held[rank], 0, spec.unit).tolist()
        assert list(range(start, stop)) == [number - 1 for number in numbers]
        alone = whole.narrow(spec.dim, start, stop - start)
        assert torch.equal(spec.padded(alone, n), part)
    assert torch.equal(spec.join(parts), whole)
    owned = [(rank, row) for rank, start, stop in spec.owners(n) for row in range(start, stop)]
    assert [row for _, row in owned] == list(range(count * spec.unit))
    assert all(row // spec.unit in held[rank] for rank, row in owned)
    assert {sum(block in blocks for blocks in held) for block in range(count)} == {spec.copies(n)}


@pytest.mark.parametrize("heads, kv_heads", ATTENTION)
def test_heads_at_every_degree(heads, kv_heads):
    config = ModelConfig(3, 1, heads, kv_heads, UNIT, 5, 7, qkv_bias=True)
    table = layer_table(config)
    for n in DEGREES:
        ranks = dealt(heads, kv_heads, n)
        queries, keys = [q for q, _ in ranks], [kv for _, kv in ranks]
        for name, held in (("wq", queries), ("wo", queries), ("wk", keys), ("wv", keys)):
            check(table[f"attention.{name}.weight"], held, n)
        for name in ("wq", "wk", "wv"):
            weight, bias = table[f"attention.{name}.weight"], table[f"attention.{name}.bias"]
            assert bias.shape == weight.shape[:1] and bias.copies(n) == weight.copies(n)
            for rank in range(n):
                assert bias.local_range(rank, n) == weight.local_range(rank, n)
            assert bias.local_shape(n) == weight.local_shape(n)[:1]
        # attention gives each of a rank's kv heads an equal run of its query heads: they must be
        # the ones that belong to it
        q_share = table["attention.wq.weight"].local_shape(n)[0] // UNIT
        kv_share = table["attention.wk.weight"].local_shape(n)[0] // UNIT
        assert q_share % kv_share == 0
        run = q_share // kv_share
        for q_heads, kvs in ranks:
            for i, head in enumerate(q_heads):
                assert kvs[i // run] == head // (heads // kv_heads)


@pytest.mark.parametrize("size", (1, 7, 8, 97, 101))
def test_plain_axes_at_every_degree(size):
    for n in DEGREES:
        most = -(-size // n)
        held = [[row for row in range(size) if row // most == rank] for rank in range(n)]
        for spec in (TensorSpec((size, 3), 0), TensorSpec((3, size), 1)):
            check(spec, held, n)


@pytest.mark.parametrize(
    "heads, kv_heads, n, q_share, kv_share, copies",
    (
        (52, 52, 8, 7, 7, 1),  # padded to 56
        (64, 8, 16, 4, 1, 2),
        (28, 4, 8, 4, 1, 2),
        (24, 3, 8, 4, 1, 2),
        (8, 1, 4, 2, 1, 4),
        (7, 1, 4, 2, 1, 4),
        (12, 6, 4, 4, 2, 1),
    ),
)
def test_shares_by_hand(heads, kv_heads, n, q_share, kv_share, copies):
    table = layer_table(ModelConfig(64, 1, heads, kv_heads, UNIT, 5, 7))
    q, k = table["attention.wq.weight"], table["attention.wk.weight"]
    assert (q.local_shape(n), k.local_shape(n)) == ((q_share * UNIT, 64), (kv_share * UNIT, 64))
    assert table["attention.wo.weight"].local_shape(n) == (64, q_share * UNIT)
    assert (q.copies(n), k.copies(n)) == (1, copies)


def test_whole_tensors_are_everyones():
    spec = TensorSpec((5,))
    whole = torch.arange(5)
    assert spec.copies(4) == 4 and spec.local_shape(4) == (5,)
    assert all(spec.cut(whole, rank, 4) is whole for rank in range(4))
    assert torch.equal(spec.join([whole] * 4), whole)


@pytest.mark.parametrize("n", (1, 2, 4, 7))
def test_experts_are_cut_inside(n):
    table = layer_table(ModelConfig(6, 1, 2, 1, 2, 10, 7, n_experts=3, experts_per_token=2))
    most = -(-10 // n)
    for name, shape in (("w1", (3, most, 6)), ("w2", (3, 6, most)), ("w3", (3, most, 6))):
        spec = table[f"feed_forward.experts.{name}.weight"]
        whole = torch.rand(spec.shape)
        parts = [spec.cut(whole, rank, n) for rank in range(n)]
        assert {tuple(part.shape) for part in parts} == {shape}
        assert torch.equal(spec.join(parts), whole)
    assert table["feed_forward.gate.weight"] == TensorSpec((3, 6))


# the widths of the released shards, as models.md lists them
SHEET = {
    "llama-1-13b": (
        2,
        dict(tok_embeddings=[32000, 2560], output=[16000, 5120])
        | dict(wq=[2560, 5120], wk=[2560, 5120], wv=[2560, 5120], wo=[5120, 2560])
        | dict(w1=[6912, 5120], w3=[6912, 5120], w2=[5120, 6912]),
    ),
    "llama-2-70b": (
        8,
        dict(tok_embeddings=[32000, 1024], output=[4000, 8192])
        | dict(wq=[1024, 8192], wk=[128, 8192], wv=[128, 8192], wo=[8192, 1024])
        | dict(w1=[3584, 8192], w3=[3584, 8192], w2=[8192, 3584]),
    ),
}


@pytest.mark.parametrize("preset", SHEET)
def test_released_shards_shapes(preset):
    n, shapes = SHEET[preset]
    for name, spec in tensor_table(PRESETS[preset]).items():
        short = name.removesuffix(".weight").rsplit(".", 1)[-1]
        assert list(spec.local_shape(n)) == shapes.get(short, [PRESETS[preset].dim]), name


def test_a_tied_embedding_is_cut_like_the_output_layer():
    sizes = dict(
        dim=6, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=2, hidden_dim=4, vocab_size=11
    )
    tied = tensor_table(ModelConfig(**sizes, tie_word_embeddings=True))
    free = tensor_table(ModelConfig(**sizes, tie_word_embeddings=False))
    assert tied["tok_embeddings.weight"].local_shape(2) == (6, 6)
    assert free["output.weight"].local_shape(2) == (6, 6)
    assert free["tok_embeddings.weight"].local_shape(2) == (11, 3) and "output.weight" not in tied
    assert tensor_table(ModelConfig(**sizes, head="score")).keys() - free.keys() == {"score.weight"}
