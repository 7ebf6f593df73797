"""Rotary frequencies are transformers'.

Qwen v1's extrapolation past its context is the published formulas'.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from src.generation.cache import Cache, Decode
from src.models.attention import Packed
from src.models.config import ModelConfig
from src.models.hf_config import config_from_hf
from src.models.rotary import inverse_frequencies, rotary_table
from src.models.transformer import Transformer


def llama_3(context: int, low: float, high: float, **more) -> dict:
    bounds = dict(low_freq_factor=low, high_freq_factor=high)
    return dict(rope_type="llama3", original_max_position_embeddings=context, **bounds, **more)


def yarn(context: int, factor: float, **more) -> dict:
    return dict(rope_type="yarn", original_max_position_embeddings=context, factor=factor, **more)


SCALED = {
    "linear": dict(rope_type="linear", factor=2.5),
    "llama3.1": llama_3(8192, 1.0, 4.0, rope_theta=5e5, factor=8.0),
    "llama3.2": llama_3(8192, 1.0, 4.0, rope_theta=5e5, factor=32.0),
    "llama3, other bounds": llama_3(512, 2.0, 9.0, factor=4.0),
    "yarn": yarn(32768, 4.0, rope_theta=1e6),
    "yarn, all given": yarn(4096, 16.0, beta_fast=20.0, beta_slow=2.0, attention_factor=1.3),
    "yarn, small": yarn(8, 3.0),
}
CONTEXT = 16
QWEN = ModelConfig(32, 1, 2, 2, 16, 40, 50, max_seq_len=CONTEXT, family="qwen", qkv_bias=True)


@pytest.mark.parametrize("head_dim", (128, 20))
@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_are_transformers(name, head_dim):
    parameters = {"rope_theta": 1e4, **SCALED[name]}
    config = AutoConfig.for_model(
        "llama",
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    wanted, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    raw = {key: value for key, value in config.to_dict().items() if key != "architectures"}
    older = dict(parameters)
    theta, older["type"] = older.pop("rope_theta"), older.pop("rope_type")
    before = {**raw, "rope_parameters": None, "rope_theta": theta, "rope_scaling": older}
    for written in (raw, before):  # as transformers 5 and 4 write it
        ours = config_from_hf(written, "config.json")
        torch.testing.assert_close(inverse_frequencies(ours), wanted, rtol=2e-6, atol=0)
        table = rotary_table(ours, 3, torch.device("cpu"))  # [3, head_dim / 2], complex
        assert abs(table.abs().max().item() - factor) <= 1e-6


def by_hand(position: int, prompt_length: int, logn: bool, ntk: bool):
    """The rotation of a query and of a key, by the formulas of Qwen's report: [head_dim / 2]."""
    alpha = max(1, 2 ** math.ceil(math.log2(prompt_length / CONTEXT) + 1) - 1) if ntk else 1
    d = QWEN.head_dim
    base = QWEN.rope_theta * alpha ** (d / (d - 2))
    key = np.exp(1j * position / base ** (np.arange(0, d, 2) / d))
    return key * (math.log(position + 1, CONTEXT) if logn and position + 1 > CONTEXT else 1), key


def assert_rotary(model, layout, prompt_lengths: list[int], logn: bool, ntk: bool) -> None:
    pairs = zip(layout.positions.tolist(), prompt_lengths, strict=True)
    wanted = [by_hand(position, length, logn, ntk) for position, length in pairs]
    for ours, hand in zip(model.rotary(layout), zip(*wanted)):
        np.testing.assert_allclose(ours, np.stack(hand), atol=2e-5, rtol=0)


@pytest.mark.parametrize("logn", (True, False))
@pytest.mark.parametrize("ntk", (True, False))
def test_qwen_extrapolates_in_evaluation_alone(logn, ntk):
    model = Transformer(replace(QWEN, use_logn_attn=logn, use_dynamic_ntk=ntk))
    lengths = [9, 16, 17, 32, 33, 70]
    of_each = [n for n in lengths for _ in range(n)]
    layout = Packed(lengths)
    assert_rotary(model.eval(), layout, of_each, logn, ntk)
    assert_rotary(model.train(), layout, of_each, False, False)
    assert_rotary(model.eval(), Packed([16, 3]), [16] * 16 + [3] * 3, False, False)


@pytest.mark.parametrize("logn", (True, False))
@pytest.mark.parametrize("ntk", (True, False))
def test_qwen_decodes_with_what_the_prompt_fixed(logn, ntk):
    """A prompt within the context keeps its base when it is decoded past it.

    A longer prompt's base stays as it was.
    """
    model = Transformer(replace(QWEN, use_logn_attn=logn, use_dynamic_ntk=ntk)).eval()
    positions = torch.tensor([9, 15, 16, 70, 40, 40, 90])
    prompts = [9, 15, 10, 12, 20, 40, 33]
    table = torch.zeros(len(prompts), 6, dtype=torch.int32)
    layout = Decode(Cache(model, 1), table, positions, torch.tensor(prompts), 96)
    assert_rotary(model, layout, prompts, logn, ntk)
    assert_rotary(model.train(), layout, prompts, False, False)
