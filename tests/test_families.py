"""Every family through all the scripts on two ranks.

Training whole and by adapter, verifier, preferences, distillation, PPO, evaluation, and home again.
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
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def commands_of(base: Path, data: Path) -> list[list[str]]:
    """The scripts of one family in turn, with what they are given."""
    train_file, label_file = data / "train.json", data / "test.json"
    pairs, verifier = data / "verifier_test.json", base / "verifier"
    small = dict(max_batch_size=4, lr=1e-3)
    labelled = dict(task="GSM8K", label_file=label_file)
    sft = dict(ckpt_dir=base / "start", save_dir=base / "solver", train_file=train_file)
    sft |= dict(labelled, max_new_tokens=4)
    lora = dict(ckpt_dir=base / "solver", save_dir=base / "lora", train_file=train_file)
    lora |= dict(lora_rank=2, quantize="nf4", freeze_layers=1)
    pairwise = dict(ckpt_dir=base / "lora", save_dir=verifier, train_file=pairs, label_file=pairs)
    pairwise |= dict(lora_rank=2)
    aligned = dict(ckpt_dir=base / "solver", save_dir=base / "aligned", train_file=pairs)
    aligned |= dict(loss="dpo,kto", lora_rank=2, cache_reference=base / "reference.safetensors")
    online = dict(ckpt_dir=base / "solver", save_dir=base / "online", train_file=train_file)
    online |= dict(online=True, reward="verifier", reward_model_ckpt_dir=verifier)
    online |= dict(max_new_tokens=6, loss="orpo")
    distilled = dict(ckpt_dir=base / "solver", save_dir=base / "distilled", train_file=train_file)
    distilled |= dict(teacher_ckpt_dir=base / "start", teacher_model_parallel_size=1)
    distilled |= dict(on_policy=0.5, divergence="js", max_new_tokens=6, teacher_quantize="int8")
    ppo = dict(actor_ckpt_dir=base / "lora", actor_save_dir=base / "policy", train_file=train_file)
    ppo |= dict(critic_ckpt_dir=verifier, critic_save_dir=base / "value")
    ppo |= dict(reward_model_ckpt_dir=verifier, reward="verifier,rule", max_buffer_size=8)
    ppo |= dict(iterations=1, mini_batches=2, ppo_epochs=1, max_new_tokens=6)
    ppo |= dict(actor_gen="tp1")
    evaluation = dict(labelled, ckpt_dir=base / "policy", log_dir=base / "evaluated")
    evaluation |= dict(num_samples=2, max_new_tokens=6, temperature=1.0, quantize="int8")
    return [
        ["solver_train.py", *flags(**sft, **small)],
        ["solver_train.py", *flags(**lora, **small)],
        ["verifier_train.py", *flags(**pairwise, **small)],
        ["preference_train.py", *flags(**aligned, **small)],
        ["preference_train.py", *flags(**online, **small)],
        ["distill_train.py", *flags(**distilled, **small)],
        ["ppo_train.py", *flags(**ppo, **small)],
        ["solver_evaluate.py", *flags(**evaluation)],
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """All commands of all families in one launch; a folder for each family."""
    root, commands = tmp_path_factory.mktemp("families"), []
    must("dataset/build.py", "arithmetic", *flags(save_dir=root / "data", n_train=24, n_test=4))
    for name in FAMILIES:
        families.save(name, families.build(name), root / name / "start")
        save_tokenizer(root / name / "start")
        commands += commands_of(root / name, root / "data")
    texts = [[str(part) for part in command] for command in commands]
    (root / "commands.json").write_text(json.dumps(texts))
    launch(2, "tests/script_chain.py", root / "commands.json")
    return root


@pytest.mark.parametrize("name", FAMILIES)
def test_every_script_serves_the_family(root, name):
    base, start = root / name, tensors(root / name / "start")
    for trained, before in (
        ("solver", start),
        ("lora", tensors(base / "solver")),
        ("aligned", tensors(base / "solver")),
        ("online", tensors(base / "solver")),
        ("distilled", tensors(base / "solver")),
        ("policy", tensors(base / "lora")),
    ):
        after = tensors(base / trained)
        assert after.keys() == before.keys() and all(t.isfinite().all() for t in after.values())
        assert any(not torch.equal(after[key], before[key]) for key in after), trained
    frozen = [key for key in start if key.startswith(("layers.0.", "tok_embeddings"))]
    lora, solver = tensors(base / "lora"), tensors(base / "solver")
    assert all(torch.equal(lora[key], solver[key]) for key in frozen)
    results = json.loads((base / "evaluated" / "results.json").read_text())
    assert results["n"] == 8 and {"pass@1", "pass@2", "maj@2"} <= set(results)
    assert len(rows_of(base / "evaluated" / "predictions.jsonl")) == 8


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_trained_goes_home(root, tmp_path, name):
    """Policy and value model load in transformers, with the tokenizer; Qwen v1 as a Qwen2 model."""
    for role, auto in (
        ("policy", AutoModelForCausalLM),
        ("value", AutoModelForSequenceClassification),
    ):
        must("checkpoint_merge.py", *flags(ckpt_dir=root / name / role, save_dir=tmp_path / role))
        model = auto.from_pretrained(tmp_path / role)
        theirs, ours = model.state_dict(), tensors(tmp_path / role)
        assert torch.equal(theirs["model.norm.weight"], ours["norm.weight"])
        model_type = {"qwen": "qwen2"}.get(name, families.CASES[name][0])
        assert model.config.model_type == model_type
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").decode([5, 6, 7]) == CHARACTERS[2:5]
