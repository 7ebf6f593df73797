"""Every family through all the scripts on two ranks: training whole and by adapter, verifier, PPO, evaluation, and home again.

What the models compute is tested elsewhere; here no script may stumble over a family.
"""

import json
import string
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.launch import launch
from tests.models import families
from tests.test_scripts import flags, must, rows_of, tensors

FAMILIES = ["mistral-odd", "mixtral-odd", "qwen", "qwen2-odd", "qwen3-odd", "qwen3-moe-odd"]
CHARACTERS = string.ascii_letters + string.digits + " .,?!+-*/=<>#\n'$%:;()"


def save_tokenizer(folder: Path) -> None:
    """A token for each character: small enough for the families' small vocabularies."""
    vocabulary = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated"),
        decoders.Fuse(),
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """All commands of all families in one launch."""
    root, commands = tmp_path_factory.mktemp("families"), []
    must("dataset/build.py", "arithmetic", *flags(save_dir=root / "data", n_train=24, n_test=4))
    for name in FAMILIES:
        start, model = root / name / "start", families.build(name)
        families.save(name, model, start)
        save_tokenizer(start)
        base, data = root / name, root / "data"
        small = dict(max_batch_size=4, lr=1e-3)
        commands += [
            ["solver_train.py", *flags(ckpt_dir=start, save_dir=base / "solver", train_file=data / "train.json", **small,
                                       task="GSM8K", label_file=data / "test.json", max_new_tokens=4)],
            ["solver_train.py", *flags(ckpt_dir=base / "solver", save_dir=base / "lora", train_file=data / "train.json", lora_rank=2,
                                       quantize="nf4", freeze_layers=1, **small)],
            ["verifier_train.py", *flags(ckpt_dir=base / "lora", save_dir=base / "verifier", lora_rank=2,
                                         train_file=data / "verifier_test.json", label_file=data / "verifier_test.json", **small)],
            ["ppo_train.py", *flags(actor_ckpt_dir=base / "lora", actor_save_dir=base / "policy", critic_ckpt_dir=base / "verifier",
                                    critic_save_dir=base / "value", reward_model_ckpt_dir=base / "verifier", reward="verifier,rule",
                                    train_file=data / "train.json", max_batch_size=4, max_buffer_size=8, iterations=1, mini_batches=2,
                                    ppo_epochs=1, max_new_tokens=6, lr=1e-3, rollout_model_parallel_size=1)],
            ["solver_evaluate.py", *flags(task="GSM8K", ckpt_dir=base / "policy", log_dir=base / "evaluated", num_samples=2,
                                          label_file=data / "test.json", max_new_tokens=6, temperature=1.0, quantize="int8")],
        ]  # fmt: skip
    (root / "commands.json").write_text(
        json.dumps([[str(part) for part in command] for command in commands])
    )
    launch(2, "tests/script_chain.py", root / "commands.json")
    return root


@pytest.mark.parametrize("name", FAMILIES)
def test_every_script_serves_the_family(made, name):
    base, start = made / name, tensors(made / name / "start")
    for trained, before in (
        ("solver", start),
        ("lora", tensors(base / "solver")),
        ("policy", tensors(base / "lora")),
    ):
        after = tensors(base / trained)
        assert after.keys() == before.keys() and all(t.isfinite().all() for t in after.values())
        assert any(not torch.equal(after[key], before[key]) for key in after), trained
    frozen = [key for key in start if key.startswith(("layers.0.", "tok_embeddings"))]
    lora, solver = tensors(base / "lora"), tensors(base / "solver")
    assert all(torch.equal(lora[key], solver[key]) for key in frozen)
    results = json.loads((base / "evaluated" / "results.json").read_text())
    assert (
        results["n"] == 8
        and {"pass@1", "pass@2", "maj@2"} <= set(results)
        and len(rows_of(base / "evaluated" / "predictions.jsonl")) == 8
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_trained_goes_home(made, tmp_path, name):
    """Policy and value model load in transformers, with the tokenizer; Qwen v1 as a Qwen2 model."""
    for role, auto in (
        ("policy", AutoModelForCausalLM),
        ("value", AutoModelForSequenceClassification),
    ):
        must("checkpoint_merge.py", *flags(ckpt_dir=made / name / role, save_dir=tmp_path / role))
        model = auto.from_pretrained(tmp_path / role)
        theirs, ours = model.state_dict(), tensors(tmp_path / role)
        key = "model.norm.weight"
        assert torch.equal(theirs[key], ours["norm.weight"]) and model.config.model_type == {
            "qwen": "qwen2"
        }.get(name, families.CASES[name][0])
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").decode([5, 6, 7]) == CHARACTERS[2:5]
