"""Attention of packed sequences, against a masked softmax in fp64.

A shared prompt is held against each sequence by itself.
"""

import functools
import inspect
import itertools
import math

import pytest
import torch
from torch.nn.attention import varlen

from src.models import attention
from src.models.attention import Packed

LENGTHS = [5, 1, 7, 3]
WINDOWS = pytest.mark.parametrize("window", (0, 1, 3, 50))
HEADS = pytest.mark.parametrize("heads, kv_heads", ((2, 2), (4, 2), (3, 1)))
DIM = 4
TREES = {  # pieces' lengths, and what each goes on from
    "one group": ([4, 3, 1, 5], [None, 0, 0, 0]),
    "pieces of one length": ([3, 3, 3], [None, 0, 0]),
    "groups and lone ones": ([2, 6, 3, 1, 2, 7, 4], [None, None, 1, 1, None, 4, 4]),
    "the prompt is the shortest": ([1, 5, 2, 6], [None, 0, 0, None]),
    "the prompt comes later": ([3, 2, 4, 2], [1, None, 1, None]),
}
EACH_TREE = pytest.mark.parametrize("tree", TREES)


def drawn(rows, heads, kv_heads, dtype=torch.float32, seed=0):
    """q, k, v and a gradient from above: [rows, heads or kv_heads, DIM]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (1.5 * torch.randn(rows, n, DIM, generator=generator)).to(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def softmax_of_seen(q, k, v, seen):
    """Each head's Σ_j softmax_j(q_i · k_j / √d) v_j over those j that seen(i, j) allows.

    One sequence. q: [queries, heads, d]; k, v: [keys, kv_heads, d]; result: [queries, heads, d].
    """
    group = q.size(1) // k.size(1)
    mask = torch.tensor([[seen(i, j) for j in range(k.size(0))] for i in range(q.size(0))])
    heads = []
    for h in range(q.size(1)):
        scores = q[:, h] @ k[:, h // group].T / math.sqrt(q.size(2))  # [queries, keys]
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        heads.append(weights @ v[:, h // group])  # [queries, d]
    return torch.stack(heads, 1)


def causal(window):
    return lambda i, j: j <= i and (not window or i - j < window)


def with_gradients(function, q, k, v, up):
    """Its value and the gradients of q, k and v."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*inputs)
    out.backward(up)
    return [out.detach(), *(x.grad for x in inputs)]


def close(ours, wanted, tolerance=1e-5):
    names = ("value", "gradient of q", "gradient of k", "gradient of v")
    for name, a, b in zip(names, ours, wanted, strict=True):
        assert a.shape == b.shape, name
        difference = float((a.double() - b.double()).abs().max())
        assert difference <= tolerance * (1 + float(b.abs().max())), name


@pytest.mark.parametrize(
    "dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)), ids=("fp32", "bf16")
)
@pytest.mark.parametrize("lengths", (LENGTHS, [4, 4], [6]), ids=str)
@WINDOWS
@HEADS
def test_each_sequence_attends_to_itself_and_what_came_before(
    lengths, window, heads, kv_heads, dtype, tolerance
):
    q, k, v, up = drawn(sum(lengths), heads, kv_heads, dtype)

    def reference(q, k, v):
        parts = zip(*(x.split(lengths) for x in (q, k, v)))
        return torch.cat([softmax_of_seen(*part, causal(window)) for part in parts])

    ours = with_gradients(lambda *x: Packed(lengths).attend(0, *x, window), q, k, v, up)
    assert all(x.dtype == dtype for x in ours)
    close(ours, with_gradients(reference, *(x.double() for x in (q, k, v, up))), tolerance)


def by_themselves(lengths, prefixes):
    """The rows of the tree that each of its sequences goes through, prompt first.

    A prompt is a sequence too.
    """
    ends = list(itertools.accumulate(lengths))
    rows = [list(range(end - length, end)) for end, length in zip(ends, lengths)]
    return [(rows[p] if p is not None else []) + own for own, p in zip(rows, prefixes)]


@EACH_TREE
@WINDOWS
@HEADS
def test_a_shared_prompt_is_as_good_as_one_for_each(tree, window, heads, kv_heads):
    """Its queries, keys and values get the sum of what the copies would."""
    lengths, prefixes = TREES[tree]
    q, k, v, up = drawn(sum(lengths), heads, kv_heads)
    sequences = by_themselves(lengths, prefixes)
    rows = torch.tensor([row for sequence in sequences for row in sequence])
    copies = torch.bincount(rows)
    alone = Packed([len(sequence) for sequence in sequences])
    layout = Packed(lengths, prefixes=prefixes)
    share = (up / copies.view(-1, 1, 1))[rows]  # of what comes from above each copy gets the same
    copied = [x[rows] for x in (q, k, v)]  # [sum of the sequences' lengths, heads, DIM]
    out, *grads = with_gradients(lambda *x: alone.attend(0, *x, window), *copied, share)
    summed = [torch.zeros_like(x).index_add_(0, rows, grad) for x, grad in zip((q, k, v), grads)]
    wanted = torch.zeros_like(q).index_copy_(0, rows, out)
    assert torch.allclose(wanted[rows], out, atol=1e-5), "the copies agree"
    ours = with_gradients(lambda *x: layout.attend(0, *x, window), q, k, v, up)
    close(ours, [wanted, *summed])


@EACH_TREE
@WINDOWS
def test_a_shared_prompt_against_the_formula(tree, window):
    lengths, prefixes = TREES[tree]
    q, k, v, up = drawn(sum(lengths), 4, 2)

    def reference(q, k, v):
        out = []
        for rows, own in zip(by_themselves(lengths, prefixes), lengths):
            out.append(softmax_of_seen(q[rows], k[rows], v[rows], causal(window))[-own:])
        return torch.cat(out)

    layout = Packed(lengths, prefixes=prefixes)
    ours = with_gradients(lambda *x: layout.attend(0, *x, window), q, k, v, up)
    close(ours, with_gradients(reference, *(x.double() for x in (q, k, v, up))))


def test_what_a_prompt_s_other_responses_hold_does_not_matter():
    lengths, prefixes = TREES["one group"]
    layout = Packed(lengths, prefixes=prefixes)
    q, k, v, _ = drawn(sum(lengths), 2, 2)
    before = layout.attend(0, q, k, v)
    for x in (q, k, v):
        x[4:7] += 5
    after = layout.attend(0, q, k, v)
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[7:], after[7:])
    assert not torch.allclose(before[4:7], after[4:7])


@EACH_TREE
def test_positions_ends_and_context(tree):
    lengths, prefixes = TREES[tree]
    layout = Packed(lengths, prefixes=prefixes)
    sequences = by_themselves(lengths, prefixes)
    assert layout.positions.tolist() == [
        i for s, own in zip(sequences, lengths) for i in range(len(s) - own, len(s))
    ]
    assert layout.ends.tolist() == [sequence[-1] for sequence in sequences]
    assert layout.starts.tolist() == [sequence[-own] for sequence, own in zip(sequences, lengths)]
    assert layout.context == max(map(len, sequences)) == int(layout.positions.max()) + 1
    assert layout.longest == max(lengths)


def test_positions_ends_and_context_written_out():
    layout = Packed([2, 3, 1, 4], prefixes=[None, 0, 0, None])
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 2, 3]
    assert layout.ends.tolist() == [1, 4, 5, 9]
    assert layout.context == 5 and layout.longest == 4


@pytest.mark.parametrize(
    "lengths, prefixes", ((LENGTHS, None), ([3, 3], None), *TREES.values()), ids=str
)
def test_means_and_padding_are_of_a_sequence_s_own_tokens(lengths, prefixes):
    layout = Packed(lengths, prefixes=prefixes)
    x = drawn(sum(lengths), 2, 2)[0].requires_grad_()
    parts = x.detach().split(lengths)
    assert torch.allclose(layout.means(x), torch.stack([part.mean(0) for part in parts]), atol=1e-6)
    padded = layout.pad(x)
    assert torch.equal(padded, torch.nn.utils.rnn.pad_sequence(parts, batch_first=True))
    assert torch.equal(layout.unpad(padded), x)
    layout.unpad(2 * padded).backward(x.detach())
    assert torch.equal(x.grad, 2 * x.detach())


def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, grouped):
    """What varlen_attn is said to compute. Causal masks align the last query with the last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
    bounds_q, bounds_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert bounds_q[0] == bounds_k[0] == 0 and bounds_q[-1] == query.size(0)
    assert bounds_k[-1] == key.size(0) == value.size(0)
    if not grouped:
        numbers = {x.size(1) for x in (query, key, value)}
        assert len(numbers) == 1, "without enable_gqa all heads are the same number"
    assert key.size(1) == value.size(1) and query.size(1) % key.size(1) == 0
    left, right = window_size
    out = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k)):
        assert 0 < q1 - q0 <= max_q and 0 < k1 - k0 <= max_k
        shift = (k1 - k0) - (q1 - q0)

        def seen(i, j, shift=shift):
            return (left < 0 or j >= i + shift - left) and (right < 0 or j <= i + shift + right)

        out.append(softmax_of_seen(query[q0:q1], key[k0:k1], value[k0:k1], seen))
    return torch.cat(out)


def newer(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert scale is None
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, enable_gqa)


def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """It has no flag for query heads that share a kv head, and takes them."""
    assert scale is None
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, True)


@pytest.mark.parametrize("signature", (newer, older), ids=("enable_gqa", "no enable_gqa"))
@pytest.mark.parametrize("lengths, prefixes", ((LENGTHS, None), *TREES.values()), ids=str)
@WINDOWS
@HEADS
def test_the_gpu_s_kernel_is_asked_for_the_same(
    monkeypatch, lengths, prefixes, window, heads, kv_heads, signature
):
    heads_of_keys = set()

    @functools.wraps(signature)
    def spy(query, key, *rest, **options):
        heads_of_keys.add(key.size(1))
        return signature(query, key, *rest, **options)

    monkeypatch.setattr(varlen, "varlen_attn", spy)
    layout = Packed(lengths, prefixes=prefixes)
    q, k, v, up = drawn(sum(lengths), heads, kv_heads)
    ours = with_gradients(lambda *x: layout._variable_length(0, *x, window), q, k, v, up)
    assert heads_of_keys == {kv_heads}, "no copies of them"
    close(ours, with_gradients(lambda *x: layout.attend(0, *x, window), q, k, v, up))


def test_the_kernel_that_is_installed_takes_what_it_is_given(monkeypatch):
    """Its real signature, called with what `_variable_length` gives it."""
    signature, calls = inspect.signature(varlen.varlen_attn), []

    def record(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return args[0]

    record.__signature__ = signature
    monkeypatch.setattr(varlen, "varlen_attn", record)
    lengths, prefixes = TREES["one group"]
    q, k, v, _ = drawn(sum(lengths), 4, 2)
    Packed(lengths, prefixes=prefixes)._variable_length(0, q, k, v, 3)
    (arguments,) = calls
    assert arguments["window_size"] == (2, 0)
    assert (arguments["max_q"], arguments["max_k"]) == (5, 9)
    assert arguments["cu_seq_q"].tolist() == [0, 4, 7, 8, 13]
    assert arguments["cu_seq_k"].tolist() == [0, 4, 11, 16, 25]


@pytest.mark.parametrize("width, is_taken", ((64, True), (256, True), (12, False), (264, False)))
def test_widths_of_heads_that_the_gpu_s_kernel_has(width, is_taken):
    assert attention.flash_takes(width) == is_taken
