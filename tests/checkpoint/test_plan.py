"""The released sizes of all model types at 1, 2, 4 and 8 ranks, laid out without weights."""

import pytest
import torch

from src.checkpoint.plan import dry_run
from src.models.hf_config import PRESETS

PARAMETERS = {  # of the released checkpoints, counted by their publishers
    "llama-1-7b": 6_738_415_616,
    "llama-1-13b": 13_015_864_320,
    "llama-1-33b": 32_528_943_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "mistral-7b-instruct-v0.2": 7_241_732_096,
    "mixtral-8x7b-instruct-v0.1": 46_702_792_704,
    "qwen-7b": 7_721_324_544,
    "qwen-14b": 14_167_290_880,
    "qwen-72b": 72_287_920_128,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
}
# (dim, layers, heads, kv heads, ffn, vocabulary) of the published configs, again
SHAPES = {
    "llama-1-7b": (4096, 32, 32, 32, 11008, 32000),
    "llama-1-13b": (5120, 40, 40, 40, 13824, 32000),
    "llama-1-33b": (6656, 60, 52, 52, 17920, 32000),
    "llama-2-7b": (4096, 32, 32, 32, 11008, 32000),
    "llama-2-13b": (5120, 40, 40, 40, 13824, 32000),
    "llama-2-70b": (8192, 80, 64, 8, 28672, 32000),
    "mistral-7b-instruct-v0.2": (4096, 32, 32, 8, 14336, 32000),
    "mixtral-8x7b-instruct-v0.1": (4096, 32, 32, 8, 14336, 32000),
    "qwen-7b": (4096, 32, 32, 32, 11008, 151936),
    "qwen-14b": (5120, 40, 40, 40, 13696, 152064),
    "qwen-72b": (8192, 80, 64, 64, 24576, 152064),
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064),
    "qwen3-8b": (4096, 36, 32, 8, 12288, 151936),
}
HEAD_DIM = {"qwen2.5-0.5b": 64}  # all others 128


def expected_shapes(model_type: str, n: int) -> dict[str, list[int]]:
    """One rank's tensors, from the published sizes.

    Not all divide: llama-1-33b has 7 of 52 heads at 8 ranks, and with more ranks than kv heads
    (qwen2.5) these are repeated, and each group's query heads shared.
    """
    dim, layers, heads, kv_heads, ffn, vocab = SHAPES[model_type]
    size, group = HEAD_DIM.get(model_type, 128), heads // kv_heads
    ranks = max(1, n // kv_heads)  # that share a kv head
    kv = -(-kv_heads // n) * size
    q = -(-kv_heads // n) * -(-group // ranks) * size
    layer = {
        "attention.wq.weight": [q, dim],
        "attention.wk.weight": [kv, dim],
        "attention.wv.weight": [kv, dim],
        "attention.wo.weight": [dim, q],
        "attention_norm.weight": [dim],
        "ffn_norm.weight": [dim],
    }
    if model_type.startswith("qwen3"):
        layer |= {"attention.q_norm.weight": [size], "attention.k_norm.weight": [size]}
    elif model_type.startswith("qwen"):
        layer |= {"attention.wq.bias": [q], "attention.wk.bias": [kv], "attention.wv.bias": [kv]}
    if model_type.startswith("mixtral"):
        layer |= {
            "feed_forward.gate.weight": [8, dim],
            "feed_forward.experts.w1.weight": [8, ffn // n, dim],
            "feed_forward.experts.w2.weight": [8, dim, ffn // n],
            "feed_forward.experts.w3.weight": [8, ffn // n, dim],
        }
    else:
        layer |= {
            "feed_forward.w1.weight": [ffn // n, dim],
            "feed_forward.w2.weight": [dim, ffn // n],
            "feed_forward.w3.weight": [ffn // n, dim],
        }
    whole = {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    whole |= {"norm.weight": [dim]}
    if model_type == "qwen2.5-0.5b":  # tied
        return whole | {"tok_embeddings.weight": [vocab // n, dim]}
    return whole | {
        "tok_embeddings.weight": [vocab, dim // n],
        "output.weight": [vocab // n, dim],
    }


@pytest.mark.parametrize("model_type", PARAMETERS)
def test_released_sizes(model_type):
    assert set(PRESETS) == set(PARAMETERS) == set(SHAPES)
    for n in (1, 2, 4, 8):
        plan = dry_run(PRESETS[model_type], n, torch.bfloat16)
        expected = expected_shapes(model_type, n)
        assert {name: list(spec.local_shape(n)) for name, spec in plan.table.items()} == expected
        assert plan.parameters == PARAMETERS[model_type]
        size = 2 * sum(torch.Size(shape).numel() for shape in expected.values())
        assert plan.rank_bytes(0) == size
        text = "\n".join(plan.lines())
        assert f"{PARAMETERS[model_type]:,} parameters" in text
        assert f"each of {n} ranks: {size:,} bytes" in text
        first = [name for name in expected if "layers." not in name or "layers.0." in name]
        assert all(name.replace("layers.0.", "layers.*.") in text for name in first)
        assert str(expected["layers.0.attention.wk.weight"]) in text


def test_heads_that_do_not_divide_are_padded():
    """The last of 8 ranks has 3 of the 52 heads, and zeros."""
    spec = dry_run(PRESETS["llama-1-33b"], 8, torch.bfloat16).table["layers.0.attention.wq.weight"]
    heads = [[bound // 128 for bound in spec.local_range(rank, 8)] for rank in range(8)]
    assert heads == [[0, 7], [7, 14], [14, 21], [21, 28], [28, 35], [35, 42], [42, 49], [49, 52]]
