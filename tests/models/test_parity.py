"""The model computes what transformers' Llama computes: output and every gradient, at 1, 2 and 4 ranks.

The references are made here, once; the ranks (parity_worker.py) write down how far they are from them.
"""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from src.checkpoint.source import Checkpoint, to_hf_name
from src.checkpoint.write import merge
from src.models.config import config_from_hf
from src.models.lora import TARGETS, lora_table
from tests.launch import launch, once
from tests.models.parity_worker import ALPHA, RANK

TOLERANCE = 1e-5
DEGREES = (1, 2, 4)
LENGTHS = [9, 1, 17, 4, 12]
SHAPES = {
    # rank counts up to 4 must divide vocabulary, heads, kv heads and ffn
    "grouped": dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=172, vocab_size=96,
                    rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False, num_hidden_layers=3),
    "tied": dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=128, vocab_size=100,
                 rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, num_hidden_layers=2),
    "wide-heads": dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=20, intermediate_size=172,
                       vocab_size=128, rms_norm_eps=1e-6, rope_theta=5e5, tie_word_embeddings=False, num_hidden_layers=2),
    "grouped-tied": dict(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, intermediate_size=52, vocab_size=64,
                         rms_norm_eps=1e-5, rope_theta=100.0, tie_word_embeddings=True, num_hidden_layers=2),
    "verifier": dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=172, vocab_size=96,
                     rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False, num_hidden_layers=2, num_labels=1,
                     pad_token_id=0),
}
LANGUAGE_MODELS = [name for name in SHAPES if name != "verifier"]
LORA = ["grouped", "tied"]


def build_hf(name: str):
    sizes = dict(SHAPES[name])
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    config = LlamaConfig(**sizes, rope_parameters=rope, initializer_range=0.2, attn_implementation="eager",
                         bos_token_id=1, eos_token_id=2)
    torch.manual_seed(len(name))
    model = (LlamaForSequenceClassification if name == "verifier" else LlamaForCausalLM)(config).eval()
    for parameter in model.parameters():  # norms and biases away from where they start, so that they matter
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def draw_tokens(vocab_size: int):
    generator = torch.Generator().manual_seed(vocab_size)
    draw = lambda: torch.randint(3, vocab_size, (sum(LENGTHS),), generator=generator)
    return draw(), draw()


def logits_one_by_one(model, tokens, weights=None):
    """Each sequence by itself, so that the reference knows no packing: [N, vocabulary]."""
    rows = []
    for part in tokens.split(LENGTHS):
        call = dict(input_ids=part[None], use_cache=False)
        out = model(**call) if weights is None else torch.func.functional_call(model, weights, (), call)
        rows.append(out.logits[0])
    return torch.cat(rows)


def language_reference(model) -> dict:
    tokens, targets = draw_tokens(model.config.vocab_size)
    logits = logits_one_by_one(model, tokens)
    loss = F.cross_entropy(logits, targets)
    loss.backward()
    gradients = {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return dict(tokens=tokens, targets=targets, logits=logits.detach(), loss=loss.detach(), **gradients)


def lora_reference(model, tokens, targets) -> dict:
    """The adapter as dense weights W + scale · B A, in Hugging Face's row order."""
    generator = torch.Generator().manual_seed(11)
    config = config_from_hf(model.config.to_dict() | {"architectures": []}, "test")
    factors = {name: torch.randn(spec.shape, generator=generator) * 0.1 for name, spec in lora_table(config, RANK).items()}
    leaves = {name: factor.requires_grad_() for name, factor in factors.items()}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name in leaves:
        if name.endswith(".lora_a"):
            stem = name.removesuffix(".lora_a")
            hf = to_hf_name(f"{stem}.weight")
            weights[hf] = weights[hf] + ALPHA / RANK * leaves[f"{stem}.lora_b"] @ leaves[name]
    logits = logits_one_by_one(model, tokens, weights)
    F.cross_entropy(logits, targets).backward()
    gradients = {f"lora grad.{name}": leaf.grad for name, leaf in leaves.items()}
    return {"lora logits": logits.detach(), **{n: f.detach() for n, f in leaves.items()}, **gradients}


def verifier_reference(model) -> dict:
    """Scores from a right-padded batch, as transformers takes it."""
    tokens, targets = draw_tokens(model.config.vocab_size)
    ids = torch.nn.utils.rnn.pad_sequence(tokens.split(LENGTHS), batch_first=True, padding_value=0)
    scores = model(input_ids=ids, attention_mask=ids != 0, use_cache=False).logits[:, 0]
    weights = torch.linspace(-1, 2, len(LENGTHS))
    (scores * weights).sum().backward()
    gradients = {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        hidden = torch.cat([model.model(part[None], use_cache=False)[0][0] for part in tokens.split(LENGTHS)])
        every = F.linear(hidden, model.score.weight)[:, 0]
    return {"tokens": tokens, "targets": targets, "scores": scores.detach(), "weights": weights, "every score": every, **gradients}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Every case's model and reference."""
    root = tmp_path_factory.mktemp("parity")
    for name in SHAPES:
        model = build_hf(name)
        model.save_pretrained(root / name / "hf")
        if name == "verifier":
            reference = verifier_reference(model)
        else:
            reference = language_reference(model)
            if name in LORA:
                reference |= lora_reference(model, reference["tokens"], reference["targets"])
        reference = {key: value.contiguous() for key, value in reference.items()}
        save_file(reference | {"lengths": torch.tensor(LENGTHS)}, root / name / "reference.safetensors")
    return root


@pytest.fixture(scope="module")
def output(work, tmp_path_factory):
    """n → the folder that n ranks wrote to. Each degree runs once, and fails by itself."""
    root = tmp_path_factory.mktemp("parity-out")

    @once
    def run(n: int) -> Path:
        launch(n, "tests/models/parity_worker.py", str(work), str(root / f"of-{n}"))
        return root / f"of-{n}"

    return run


@pytest.fixture(scope="module", params=DEGREES)
def deviations(request, output) -> dict:
    return json.loads(output(request.param).with_suffix(".json").read_text())


def of(deviations: dict, start: str) -> dict:
    found = {check: value for check, value in deviations.items() if check.startswith(start)}
    assert found, f"no check {start} was run"
    return found


def beyond(found: dict, tolerance: float) -> dict:
    return {check: value for check, value in found.items() if not value <= tolerance}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_are_transformers(deviations, name):
    assert deviations[f"{name}/logits"] <= TOLERANCE
    assert deviations[f"{name}/loss"] <= TOLERANCE


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_gradient_is_transformers(deviations, name):
    found = of(deviations, f"{name}/grad ")
    layers = SHAPES[name]["num_hidden_layers"]
    heads = 0 if SHAPES[name]["tie_word_embeddings"] else 1  # output or score
    assert len(found) == 9 * layers + 2 + heads
    assert not beyond(found, TOLERANCE)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_recomputed_activations_give_the_same_gradients(deviations, name):
    assert deviations[f"{name}/recompute"] <= 1e-6


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_packed_neighbours_do_not_matter(deviations, name):
    assert deviations[f"{name}/alone"] <= TOLERANCE
    assert deviations[f"{name}/neighbours"] == 0
    assert deviations[f"{name}/neighbours matter not, the tokens do"] < 10, "the neighbours' tokens were never changed"


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_response_logprobs_and_entropy_with_temperature(deviations, name):
    assert deviations[f"{name}/response logprobs"] <= TOLERANCE
    assert deviations[f"{name}/response entropy"] <= TOLERANCE


def test_verifier_scores_are_transformers(deviations):
    assert deviations["verifier/scores"] <= TOLERANCE
    assert deviations["verifier/values"] <= TOLERANCE
    assert deviations["verifier/last values"] <= TOLERANCE


@pytest.mark.parametrize("name", LORA)
def test_lora_is_the_dense_sum(deviations, name):
    assert deviations[f"{name}/lora starts as the base model"] == 0
    assert deviations[f"{name}/lora logits"] <= TOLERANCE
    assert deviations[f"{name}/lora recompute"] <= 1e-6
    assert deviations[f"{name}/lora trains other weights"] == 0
    found = of(deviations, f"{name}/lora grad ")
    assert len(found) == 2 * len(TARGETS) * SHAPES[name]["num_hidden_layers"]
    assert not beyond(found, TOLERANCE)


@pytest.mark.parametrize("name", LORA)
def test_lora_starts_alike_at_every_degree(output, name):
    whole, *others = (load_file(output(n) / f"{name}-fresh.safetensors") for n in DEGREES)
    for key, factor in whole.items():
        zero = key.endswith("lora_B.weight")
        assert bool(factor.any()) is not zero, key
        assert all(torch.equal(factor, other[key]) for other in others), key
    assert all(whole.keys() == other.keys() for other in others)


@pytest.mark.parametrize("n", DEGREES)
@pytest.mark.parametrize("name", LORA)
def test_saved_adapter_loads_in_peft(work, output, name, n):
    from peft import PeftModel

    reference = load_file(work / name / "reference.safetensors")
    base = AutoModelForCausalLM.from_pretrained(work / name / "hf", attn_implementation="eager")
    adapter = output(n) / name / "adapter"
    model = PeftModel.from_pretrained(base, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    assert weights.keys() == {k.replace(".default", "") for k in model.state_dict() if "lora_" in k}
    with torch.no_grad():
        logits = logits_one_by_one(model, reference["tokens"])
    assert (logits - reference["lora logits"]).abs().max() <= TOLERANCE * reference["lora logits"].abs().max()


@pytest.mark.parametrize("n", DEGREES)
@pytest.mark.parametrize("name", LORA)
def test_saved_checkpoint_holds_the_adapter_merged_in(work, output, tmp_path, name, n):
    reference = load_file(work / name / "reference.safetensors")
    merge(Checkpoint.open(str(output(n) / name)), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    with torch.no_grad():
        logits = logits_one_by_one(model, reference["tokens"])
    assert (logits - reference["lora logits"]).abs().max() <= TOLERANCE * reference["lora logits"].abs().max()
