"""The rotation that a config.json asks for: transformers' own, or refused where that is unclear."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from src.checkpoint.source import Checkpoint, read_config
from src.checkpoint.write import merge
from src.errors import UserError
from src.models.config import RopeScaling
from tests.checkpoint.test_adapter import logits_of
from tests.checkpoint.tiny import BASE, write_hf

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.0}
OF_4 = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default"}
MILLION = {"rope_theta": 1e6}


def written(folder: Path, rope: dict, family: str = "qwen3") -> Path:
    """A config.json whose rotation is `rope` alone."""
    config = AutoConfig.for_model(family, **BASE).to_dict()
    config = {key: value for key, value in config.items() if not key.startswith("rope_")}
    path = folder / "config.json"
    path.write_text(json.dumps(config | rope))
    return path


SAME = {  # what both read alike
    "a scaling beside plain parameters": dict(
        MILLION, rope_scaling=YARN, rope_parameters=PLAIN | MILLION
    ),
    "by transformers 4's word": dict(MILLION, rope_scaling=OF_4, rope_parameters=PLAIN | MILLION),
    "with its own base": dict(
        rope_scaling=YARN | MILLION, rope_parameters=PLAIN | MILLION, rope_theta=None
    ),
    "both the same": dict(
        MILLION, rope_scaling=YARN | MILLION, rope_parameters=YARN | MILLION | {"beta_fast": 32}
    ),
    "no base anywhere": dict(rope_scaling=LINEAR, rope_parameters=PLAIN),
    "an empty one": dict(MILLION, rope_scaling={}, rope_parameters=YARN | MILLION),
    "null": dict(rope_scaling=None, rope_parameters=LINEAR | MILLION),
    "the old one alone": dict(MILLION, rope_scaling=OF_4),
    "the old one alone, empty new": dict(MILLION, rope_scaling=OF_4, rope_parameters={}),
    "plain, twice": dict(MILLION, rope_scaling=PLAIN, rope_parameters=PLAIN | MILLION),
    "the new one alone, base on top": dict(MILLION, rope_parameters=LINEAR),
    "one word twice": dict(MILLION, rope_scaling=LINEAR | {"type": "linear"}),
    "nothing but a base": MILLION,
}


@pytest.mark.parametrize("family", ("llama", "mistral", "qwen3"))
@pytest.mark.parametrize("kind", SAME)
def test_the_rotation_is_transformers(tmp_path, kind, family):
    path = written(tmp_path, SAME[kind], family)
    ours, theirs = read_config(path), AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert ours.rope_theta == theirs["rope_theta"]
    scaling = ours.rope_scaling or RopeScaling("default", None, 0)
    assert (scaling.kind, scaling.factor) == (theirs["rope_type"], theirs.get("factor"))
    if scaling.kind == "yarn":
        assert scaling.original_max_seq_len == theirs["original_max_position_embeddings"]


REFUSED = {
    "a scaling whose base would be lost": (
        dict(rope_scaling=YARN, rope_parameters=PLAIN | MILLION),
        "rope_theta is 1000000.0 in rope_parameters, which transformers does not read beside",
    ),
    "another scaling": (
        dict(MILLION, rope_scaling=YARN, rope_parameters=LINEAR),
        r"rope_scaling is .*yarn.* and rope_parameters is .*linear.*two scalings",
    ),
    "another factor": (
        dict(MILLION, rope_scaling=YARN, rope_parameters=YARN | {"factor": 8.0}),
        "two scalings",
    ),
    "a scaling in the parameters alone": (
        dict(MILLION, rope_scaling=PLAIN, rope_parameters=YARN),
        "two scalings",
    ),
    "another base on top": (
        dict(rope_theta=5e6, rope_parameters=PLAIN | MILLION),
        r"rope_theta is 5000000.0 and rope_parameters.rope_theta is 1000000.0",
    ),
    "another base on top of a scaling": (
        dict(rope_theta=1e4, rope_scaling=LINEAR | MILLION),
        "rope_theta is 10000.0 and rope_scaling.rope_theta is 1000000.0",
    ),
    "another base in each": (
        dict(rope_scaling=YARN | MILLION, rope_parameters=PLAIN | {"rope_theta": 1e4}),
        "rope_scaling.rope_theta is 1000000.0 and rope_parameters.rope_theta is 10000.0",
    ),
    "layers of their own": (
        dict(rope_parameters={"full_attention": PLAIN | MILLION}),
        "rope_parameters has a rotation of its own for full_attention",
    ),
    "layers of their own, two kinds": (
        dict(
            MILLION,
            rope_parameters={"full_attention": PLAIN | MILLION, "sliding_attention": PLAIN},
        ),
        "rotation of its own for full_attention",
    ),
    "layers of their own, null": (
        dict(rope_parameters={"full_attention": None, "rope_theta": 1e6}),
        "rotation of its own for full_attention",
    ),
    "layers of their own, in the old one": (
        dict(MILLION, rope_scaling={"sliding_attention": LINEAR}),
        "rope_scaling has a rotation of its own for sliding_attention",
    ),
    "two words": (
        dict(MILLION, rope_scaling=LINEAR | {"type": "yarn"}),
        "rope_scaling has rope_type 'linear' and type 'yarn'",
    ),
    "two first contexts": (
        dict(MILLION, rope_scaling=YARN, original_max_position_embeddings=32),
        "original_max_position_embeddings is 32, and 16 in the rope parameters",
    ),
    "no object": (dict(MILLION, rope_scaling=[4.0], rope_parameters=YARN), "an? JSON object"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_versions_read_differently_is_refused(tmp_path, kind):
    rope, message = REFUSED[kind]
    with pytest.raises(UserError, match=message):
        read_config(written(tmp_path, rope))


def test_yarn_added_to_what_we_exported(tmp_path):
    """As Qwen's model cards say: the logits are then transformers' with it."""
    write_hf(tmp_path / "hf", "qwen3")
    merge(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "out", {})
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_scaling": YARN}))
    merge(Checkpoint.open(str(tmp_path / "out")), tmp_path / "again", {})
    plain, scaled, again = (
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval())
        for name in ("hf", "out", "again")
    )
    assert torch.equal(scaled, again) and not torch.allclose(scaled, plain, atol=1e-3)


@pytest.mark.parametrize("more", [dict(type="yarn"), LLAMA_3], ids=["yarn", "llama3"])
def test_the_first_context_may_stand_on_top(tmp_path, more):
    """Where transformers 5 looks for it when it makes a model of the file."""
    write_hf(tmp_path / "hf", "llama")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text()) | {"original_max_position_embeddings": 16}
    del config["rope_parameters"]
    path.write_text(
        json.dumps(config | {"rope_theta": 1e4, "rope_scaling": more | {"factor": 4.0}})
    )
    merge(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "out", {})
    theirs, ours = (
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval())
        for name in ("hf", "out")
    )
    assert read_config(path).rope_scaling.original_max_seq_len == 16
    assert torch.equal(theirs, ours)
