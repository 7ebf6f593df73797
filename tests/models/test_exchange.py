"""Weights in memory from any layout to any other: the numbers, the bytes on the way, the memory."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.launch import launch
from tests.models import families
from tests.models.exchange_worker import PAIRS, WIDE

CASES = ("llama-tied", "mixtral-odd", "qwen2-odd")
KEYS = [f"{case}: {source} > {target}" for case in CASES for source, target in PAIRS]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of four ranks saw."""
    folder = tmp_path_factory.mktemp("exchange")
    for case in CASES:
        families.save(case, families.build(case), folder / case)
    torch.manual_seed(0)
    sizes = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, vocab_size=4096)
    heads = dict(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).save_pretrained(folder / "wide")
    out = folder / "out.json"
    launch(4, "tests/models/exchange_worker.py", str(folder), str(out), timeout=400)
    return json.loads(out.read_text())


@pytest.mark.parametrize("key", KEYS)
def test_each_rank_has_what_it_would_load(key, ranks):
    for seen in (rank["pairs"][key] for rank in ranks):
        assert seen["apart"] == 0.0 and seen["same names"]
        assert (seen["held"] > 0) == seen["members"][1]
    assert ranks[0]["pairs"][key]["buckets"] > 3


@pytest.mark.parametrize("key", KEYS)
def test_what_is_sent_is_what_ranks_lack(key, ranks):
    seen = ranks[0]["pairs"][key]
    assert seen["sent"] == seen["missing"]
    has_all = key.split(": ")[1] in ("tp4 > tp4", "dp4 > pp2 tp2")
    assert (seen["sent"] == 0) == has_all


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_added_in_on_the_way(case, ranks):
    assert max(rank[f"{case}, adapted"] for rank in ranks) < 1e-6


@pytest.mark.parametrize("pair", WIDE)
def test_nobody_holds_more_than_its_parts_and_a_bucket(pair, ranks):
    source, target = pair
    for seen in (rank["memory"][f"{source} > {target}"] for rank in ranks):
        assert seen["own"] <= seen["most"] <= seen["own"] + seen["bucket"]
