"""The model computes what transformers' models compute, for every family.

The output and every gradient, at 1, 2 and 4 ranks. The references are made here, once; the ranks
(parity_worker.py) write down how far they are from them.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from src.checkpoint.names import hf_tensors
from src.checkpoint.source import Checkpoint
from src.checkpoint.write import merge
from src.models.layout import tensor_table
from src.models.lora import TARGETS, lora_table
from tests.launch import launch, once
from tests.models import families
from tests.models.families import CASES, MOE
from tests.models.parity_worker import LORA

TOLERANCE = 1e-5
DEGREES = (1, 2, 4)
LENGTHS = [9, 1, 17, 4, 12]
IDS = {"bos_token_id": 1, "eos_token_id": 2}
SCORED = ("llama", "mistral-odd", "mixtral-odd", "qwen2-odd", "qwen3-odd")
VERIFIERS = {f"verifier-{name}": name for name in SCORED}
ADAPTED = ["llama", "qwen2-odd", "mixtral", "qwen3-moe-odd"]
QKV = ["q_proj", "k_proj", "v_proj"]
PEFT = {  # a case's adapters made by peft
    "llama": {
        "all": dict(r=3, lora_alpha=8),
        "rs": dict(r=4, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    },
    "qwen2-odd": {"all": dict(r=2, lora_alpha=5)},
    "qwen": {
        "some": dict(r=3, lora_alpha=7, target_modules=["q_proj", "o_proj"]),
        "c_attn": dict(r=3, lora_alpha=7, target_modules=QKV),
    },
    "mixtral": {"attention": dict(r=3, lora_alpha=8, target_modules=[*QKV, "o_proj"])},
    "verifier-llama": {"score": dict(r=3, lora_alpha=8)},
    "verifier-qwen3-odd": {"score": dict(r=3, lora_alpha=8, use_rslora=True)},
}
LINEAR = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]


def draw_tokens(vocab_size: int):
    generator = torch.Generator().manual_seed(vocab_size)
    shape = (sum(LENGTHS),)
    tokens = torch.randint(3, vocab_size, shape, generator=generator)
    targets = torch.randint(3, vocab_size, shape, generator=generator)
    return tokens, targets


def logits_one_by_one(model, tokens):
    """Each sequence by itself, so that the reference knows no packing: [N, vocabulary]."""
    parts = [part[None] for part in tokens.split(LENGTHS)]  # each [1, t]
    return torch.cat([model(input_ids=part, use_cache=False).logits[0] for part in parts])


def language_reference(name: str, model, folder: Path) -> dict:
    tokens, targets = draw_tokens(model.config.vocab_size)
    logits = logits_one_by_one(model, tokens)
    loss = F.cross_entropy(logits, targets)
    loss.backward()
    assert all(p.grad.any() for p in model.parameters()), "a gradient that is zero tests nothing"
    norm = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
    families.save_gradients(name, model, folder / "grad")
    reference = dict(tokens=tokens, targets=targets)
    reference |= dict(logits=logits.detach(), loss=loss.detach(), norm=norm.float())
    return reference | (balance_reference(name, model, tokens, folder) if name in MOE else {})


def balance_reference(name: str, model, tokens, folder: Path) -> dict:
    """transformers' load-balancing loss of each sequence by itself.

    And the gradient of their weighted sum.
    """
    n_experts, k = model.model.layers[0].mlp.gate.weight.size(0), model.config.num_experts_per_tok
    routers = [
        model(input_ids=part[None], output_router_logits=True).router_logits
        for part in tokens.split(LENGTHS)
    ]
    balances = [load_balancing_loss_func(router, n_experts, k) for router in routers]
    balance = torch.stack(balances)  # [sequences]
    weights = torch.linspace(-1, 2, len(LENGTHS))
    (balance * weights).sum().backward()
    families.save_gradients(name, model, folder / "balance-grad")
    return dict(balance=balance.detach(), weights=weights)


def lora_reference(name: str, tokens, targets, folder: Path) -> dict:
    """A model whose weights are W + scale · B A: its logits, and its gradients beside it."""
    base, generator = Checkpoint.open(str(folder / "hf")), torch.Generator().manual_seed(11)
    table = lora_table(base.config, LORA)
    factors = {
        key: torch.randn(spec.shape, generator=generator) * 0.1 for key, spec in table.items()
    }
    summed = {}
    for key in base.table:
        weight, stem = base.read(key), key.removesuffix(".weight")
        if f"{stem}.lora_a" in factors:
            weight = weight + LORA.scale * factors[f"{stem}.lora_b"] @ factors[f"{stem}.lora_a"]
        summed |= hf_tensors(key, weight, base.config)
    (folder / "summed").mkdir()
    save_file(summed, folder / "summed" / "model.safetensors", metadata={"format": "pt"})
    (folder / "summed" / "config.json").write_text((folder / "hf" / "config.json").read_text())
    model = from_folder(folder / "summed", name)
    logits = logits_one_by_one(model, tokens)
    F.cross_entropy(logits, targets).backward()
    families.save_gradients(name, model, folder / "lora-grad")
    return {"lora logits": logits.detach(), **factors}


def from_folder(folder: Path, name: str):
    return AutoModelForCausalLM.from_pretrained(folder, **families.implementations(name)).eval()


def peft_references(name: str, model, tokens, folder: Path) -> dict:
    """Adapters by `peft`, both factors random, and what it makes of the tokens with each."""
    references, scored = {}, name in VERIFIERS
    compute = scores if scored else logits_one_by_one
    for key, settings in PEFT.get(name, {}).items():
        task = "SEQ_CLS" if scored else "CAUSAL_LM"
        config = LoraConfig(**{"target_modules": LINEAR, **settings}, task_type=task)
        adapted = get_peft_model(model, config).eval()
        torch.manual_seed(3)
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.data = 0.2 * torch.randn_like(parameter)
        if key == "c_attn":
            share_the_first_factor(adapted)
        with torch.no_grad():
            references[f"peft-{key}"] = compute(adapted, tokens)
        adapted.save_pretrained(folder / f"peft-{key}")
        if key == "c_attn":
            fuse(folder / f"peft-{key}")
        model = adapted.unload()
    return references


def share_the_first_factor(adapted) -> None:
    for layer in adapted.base_model.model.model.layers:
        q, k, v = (getattr(layer.self_attn, f"{x}_proj").lora_A.default.weight for x in "qkv")
        k.data, v.data = q.data, q.data


def fuse(folder: Path) -> None:
    """q, k and v's adapters, which share A, as Qwen v1's own code has them: one of c_attn."""
    factors, fused = load_file(folder / "adapter_model.safetensors"), {}
    for key in (key for key in factors if "q_proj.lora_A" in key):
        name = key.replace("model.model.layers", "model.transformer.h")
        name = name.replace("self_attn.q_proj", "attn.c_attn")
        fused[name] = factors[key]
        parts = [factors[key.replace("q_proj.lora_A", f"{x}_proj.lora_B")] for x in "qkv"]
        fused[name.replace("lora_A", "lora_B")] = torch.cat(parts)
    save_file(fused, folder / "adapter_model.safetensors")


def scores(model, tokens):
    """From a right-padded batch, as transformers takes it."""
    ids = torch.nn.utils.rnn.pad_sequence(tokens.split(LENGTHS), batch_first=True, padding_value=0)
    return model(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False).logits[:, 0]


def verifier_reference(name: str, model, folder: Path) -> dict:
    tokens, targets = draw_tokens(model.config.vocab_size)
    weights, scored = torch.linspace(-1, 2, len(LENGTHS)), scores(model, tokens)
    (scored * weights).sum().backward()
    families.save_gradients(name, model, folder / "grad")
    with torch.no_grad():
        parts = [part[None] for part in tokens.split(LENGTHS)]  # each [1, t]
        hidden = torch.cat([model.model(part, use_cache=False)[0][0] for part in parts])
        every = F.linear(hidden, model.score.weight)[:, 0]  # [N, dim] → [N]
    reference = {"tokens": tokens, "targets": targets, "weights": weights}
    return reference | {"scores": scored.detach(), "every score": every}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Every case's model and reference."""
    root = tmp_path_factory.mktemp("parity")
    for name in (*CASES, *VERIFIERS):
        folder = root / name
        model = families.build(VERIFIERS.get(name, name), scored=name in VERIFIERS)
        families.save(name, model, folder / "hf")
        reference_of = verifier_reference if name in VERIFIERS else language_reference
        reference = reference_of(name, model, folder)
        if name in ADAPTED:
            reference |= lora_reference(name, reference["tokens"], reference["targets"], folder)
        reference |= peft_references(name, model, reference["tokens"], folder)
        reference = {key: value.contiguous() for key, value in reference.items()}
        save_file(reference | {"lengths": torch.tensor(LENGTHS)}, folder / "reference.safetensors")
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
    checks = {check: value for check, value in deviations.items() if check.startswith(start)}
    assert checks, f"no check {start} was run"
    return checks


def beyond(deviations: dict, tolerance: float) -> dict:
    return {check: value for check, value in deviations.items() if not value <= tolerance}


def assert_gradients(deviations: dict, case: str, check: str, names) -> None:
    gradients = of(deviations, f"{case}/{check} ")
    assert {key.rsplit(" ", 1)[1] for key in gradients} == set(names)
    assert not beyond(gradients, TOLERANCE)
    start = f"{case}/padding of {check} "
    padding = {key: value for key, value in deviations.items() if key.startswith(start)}
    assert not beyond(padding, 0)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_transformers(deviations, name):
    assert deviations[f"{name}/logits"] <= TOLERANCE
    assert deviations[f"{name}/logits, padding"] == 0
    assert deviations[f"{name}/loss"] <= TOLERANCE


@pytest.mark.parametrize("name", (*CASES, *VERIFIERS))
def test_every_gradient_is_transformers(deviations, work, name):
    table = tensor_table(Checkpoint.open(str(work / name / "hf")).config)
    assert_gradients(deviations, name, "grad", table)


@pytest.mark.parametrize("name", CASES)
def test_gradient_norm_is_the_references(deviations, name):
    assert deviations[f"{name}/norm"] <= 1e-6


@pytest.mark.parametrize("name", CASES)
def test_recomputed_activations_give_the_same_gradients(deviations, name):
    assert deviations[f"{name}/recompute"] <= 1e-6


@pytest.mark.parametrize("name", ADAPTED)
def test_frozen_layers_get_no_gradient_and_change_no_other(deviations, name):
    assert deviations[f"{name}/frozen"] == 0
    assert deviations[f"{name}/beside the frozen"] <= 1e-6


@pytest.mark.parametrize("name", CASES)
def test_packed_neighbours_do_not_matter(deviations, name):
    assert deviations[f"{name}/alone"] <= TOLERANCE
    # an expert's rows are one matrix product with the neighbours', and round like it
    assert deviations[f"{name}/neighbours"] <= (1e-6 if name in MOE else 0)
    changed = deviations[f"{name}/neighbours matter not, the tokens do"]
    assert changed < 10, "the neighbours' tokens were never changed"


@pytest.mark.parametrize("name", CASES)
def test_response_logprobs_and_entropy_with_temperature(deviations, name):
    assert deviations[f"{name}/response logprobs"] <= TOLERANCE
    assert deviations[f"{name}/response entropy"] <= TOLERANCE


@pytest.mark.parametrize("name", MOE)
def test_balance_loss_is_transformers_of_each_sequence(deviations, work, name):
    assert deviations[f"{name}/balance"] <= TOLERANCE
    assert deviations[f"{name}/balance, weighted"] <= TOLERANCE
    assert deviations[f"{name}/balance, recompute"] <= 1e-6
    assert deviations[f"{name}/balance without gradients"] == 0
    table = tensor_table(Checkpoint.open(str(work / name / "hf")).config)
    assert_gradients(deviations, name, "balance grad", table)


@pytest.mark.parametrize("name", VERIFIERS)
def test_verifier_scores_are_transformers(deviations, name):
    assert deviations[f"{name}/scores"] <= TOLERANCE
    assert deviations[f"{name}/values"] <= TOLERANCE
    assert deviations[f"{name}/last values"] <= TOLERANCE


@pytest.mark.parametrize("name", ADAPTED)
def test_lora_is_the_dense_sum(deviations, work, name):
    assert deviations[f"{name}/lora starts as the base model"] <= TOLERANCE
    assert deviations[f"{name}/a fresh adapter adds exactly nothing"] == 0
    assert deviations[f"{name}/lora logits"] <= TOLERANCE
    assert deviations[f"{name}/lora recompute"] <= 1e-6
    assert deviations[f"{name}/lora norm"] <= TOLERANCE
    assert deviations[f"{name}/lora trains other weights"] == 0
    table = lora_table(Checkpoint.open(str(work / name / "hf")).config, LORA)
    assert len(table) == 2 * len(TARGETS) * CASES[name][1]["num_hidden_layers"]
    assert_gradients(deviations, name, "lora grad", table)


@pytest.mark.parametrize("name", ADAPTED)
def test_lora_starts_alike_at_every_degree(output, name):
    whole, *others = (load_file(output(n) / f"{name}-fresh.safetensors") for n in DEGREES)
    for key, factor in whole.items():
        assert bool(factor.any()) is key.endswith(".lora_a"), key
        assert all(torch.equal(factor, other[key]) for other in others), key
    assert all(whole.keys() == other.keys() for other in others)


def close(ours, reference) -> bool:
    return bool((ours - reference).abs().max() <= TOLERANCE * reference.abs().max())


@pytest.mark.parametrize("name", ADAPTED)
def test_dropout_is_the_same_at_every_degree(work, output, deviations, name):
    assert deviations[f"{name}/dropout in evaluation"] <= TOLERANCE
    assert deviations[f"{name}/dropout, recompute"] <= 1e-6
    whole, *others = (load_file(output(n) / f"{name}-dropout.safetensors") for n in DEGREES)
    for other in others:
        assert whole.keys() == other.keys()
        assert not [key for key in whole if not close(other[key], whole[key])]
    without = load_file(work / name / "reference.safetensors")["lora logits"]
    assert (whole["logits"] - without).abs().max() > 0.01 * without.abs().max()


@pytest.mark.parametrize("name, key", [(name, key) for name, keys in PEFT.items() for key in keys])
def test_adapter_of_peft_loads(deviations, name, key):
    assert deviations[f"{name}/peft-{key}"] <= TOLERANCE


@pytest.mark.parametrize("n", DEGREES)
@pytest.mark.parametrize("name", ADAPTED)
def test_saved_adapter_loads_in_peft(work, output, name, n):
    reference = load_file(work / name / "reference.safetensors")
    adapter = output(n) / name / "adapter"
    model = PeftModel.from_pretrained(from_folder(work / name / "hf", name), adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    if name not in MOE:  # peft fuses the experts' factors, as transformers fuses the experts
        names = [key for key in model.state_dict() if "lora_" in key]
        assert weights.keys() == {name.replace(".default", "") for name in names}
    with torch.no_grad():
        assert close(logits_one_by_one(model, reference["tokens"]), reference["lora logits"])


@pytest.mark.parametrize("n", DEGREES)
def test_saved_adapter_of_the_attention_alone_loads_in_peft(work, output, n):
    base = from_folder(work / "mixtral" / "hf", "mixtral")
    model = PeftModel.from_pretrained(base, output(n) / "mixtral-attention" / "adapter")
    tokens = load_file(work / "mixtral" / "reference.safetensors")["tokens"]
    wanted = load_file(output(n) / "mixtral-attention.safetensors")["logits"]
    with torch.no_grad():
        assert close(logits_one_by_one(model, tokens), wanted)


@pytest.mark.parametrize("n", DEGREES)
@pytest.mark.parametrize("name", ADAPTED)
def test_saved_checkpoint_holds_the_adapter_merged_in(work, output, tmp_path, name, n):
    reference = load_file(work / name / "reference.safetensors")
    merge(Checkpoint.open(str(output(n) / name)), tmp_path / "hf", IDS)
    model = from_folder(tmp_path / "hf", name)
    with torch.no_grad():
        assert close(logits_one_by_one(model, reference["tokens"]), reference["lora logits"])
