"""One rank of tests/models/test_parity.py: runs our model on what the test wrote, and writes down every deviation.

    parity_worker.py WORK OUT

WORK holds a folder per case: `hf/`, a Hugging Face model, and `reference.safetensors`, with the tokens and what
transformers made of them. OUT.json gets {check: the largest deviation over the ranks}, adapters go to OUT/<case>.
"""
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from src.checkpoint.load import load_model
from src.checkpoint.save import save_model, whole_adapter
from src.checkpoint.source import Checkpoint, generalised, to_hf_name, to_interleaved
from src.models.attention import Packed
from src.models.batch import Batch, Sequence, response_logprobs, response_values, sequence_scores
from src.models.llama import ROTARY
from src.models.lora import add_lora, lora_table
from src.parallel.setup import start, stop
from src.parallel.vocab import token_logprobs, vocab_range

RANK, ALPHA = 3, 8.0


def deviation(ours, reference) -> float:
    """Largest difference relative to the largest entry; infinite where there is nothing to compare."""
    if ours is None or ours.shape != reference.shape or not torch.isfinite(ours).all():
        return float("inf")
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


class Case:
    def __init__(self, folder: Path, parallel) -> None:
        self.folder, self.name, self.parallel = folder, folder.name, parallel
        self.reference = load_file(folder / "reference.safetensors")
        self.tokens, self.targets = self.reference["tokens"], self.reference["targets"]
        self.lengths = self.reference["lengths"].tolist()
        self.checkpoint = Checkpoint.open(str(folder / "hf"))
        self.deviations = {}

    def model(self):
        return load_model(self.checkpoint, self.parallel, torch.float32)

    def note(self, check: str, value: float) -> None:
        self.deviations[f"{self.name}/{check}"] = value

    def cut(self, name: str, spec, whole):
        """This rank's part of a tensor in Hugging Face's row order, by the layout table."""
        weight = generalised(name).replace(".lora_b", ".weight")
        if weight in ROTARY:
            whole = to_interleaved(whole, self.checkpoint.config.head_dim)
        if spec.dim is None:
            return whole
        first, last = spec.local_range(self.parallel.mp_rank, self.parallel.mp_size)
        return whole.narrow(spec.dim, first, last - first)

    def logits(self, model):
        return model.logits(model(self.tokens, Packed(self.lengths)))

    def columns(self, logits):
        first, last = vocab_range(logits.size(-1) // self.parallel.mp_size)
        return logits[:, first:last]

    def loss(self, model):
        return -token_logprobs(self.logits(model), self.targets)[0].mean()


def check_language_model(case: Case) -> None:
    model = case.model()
    with torch.no_grad():
        logits = case.logits(model)
    case.note("logits", deviation(logits, case.columns(case.reference["logits"])))
    loss = case.loss(model)
    loss.backward()
    case.note("loss", deviation(loss.detach(), case.reference["loss"]))
    note_gradients(case, model)

    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.recompute = True
    case.loss(model).backward()
    case.note("recompute", max(deviation(p.grad, gradients[name]) for name, p in model.named_parameters()))
    model.recompute = False

    with torch.no_grad():
        ends = torch.tensor(case.lengths).cumsum(0).tolist()
        spans = [slice(end - length, end) for end, length in zip(ends, case.lengths)]
        alone = [model.logits(model(case.tokens[s], Packed([s.stop - s.start]))) for s in spans]
        case.note("alone", max(deviation(a, logits[s]) for a, s in zip(alone, spans)))
        middle = spans[len(spans) // 2]
        others = (case.tokens + 1) % case.checkpoint.config.vocab_size
        others[middle] = case.tokens[middle]
        changed = model.logits(model(others, Packed(case.lengths)))
        case.note("neighbours", (changed[middle] - logits[middle]).abs().max().item())
        case.note("neighbours matter not, the tokens do", 1.0 / deviation(changed, logits))


def note_gradients(case: Case, model) -> None:
    table = case.checkpoint.table
    assert {name for name, _ in model.named_parameters()} == set(table)
    wanted = {key.removeprefix("grad.") for key in case.reference if key.startswith("grad.")}
    assert {to_hf_name(name) for name in table} == wanted
    for name, parameter in model.named_parameters():
        whole = case.reference[f"grad.{to_hf_name(name)}"]
        case.note(f"grad {name}", deviation(parameter.grad, case.cut(name, table[name], whole)))


def check_scores(case: Case) -> None:
    model = case.model()
    sequences = [Sequence(part.tolist(), 1) for part in case.tokens.split(case.lengths)]
    batch = Batch.of(sequences, case.parallel.device)
    scores = sequence_scores(model, batch)
    case.note("scores", deviation(scores, case.reference["scores"]))
    (scores * case.reference["weights"]).sum().backward()
    note_gradients(case, model)
    with torch.no_grad():
        before, last = response_values(model, batch)
    every = case.reference["every score"].split(case.lengths)
    case.note("values", deviation(before, torch.cat([row[:-1] for row in every])))
    case.note("last values", deviation(last, torch.stack([row[-1] for row in every])))


def check_lora(case: Case, out: Path) -> None:
    model = case.model()
    with torch.no_grad():
        base = case.logits(model)
    add_lora(model, RANK, ALPHA, 5, case.parallel)
    fresh = whole_adapter(model, case.parallel)
    if case.parallel.is_main:
        save_file(fresh, out / f"{case.name}-fresh.safetensors")
    with torch.no_grad():
        case.note("lora starts as the base model", (case.logits(model) - base).abs().max().item())

    table, parameters = lora_table(model.config, RANK), dict(model.named_parameters())
    assert {name for name in parameters if "lora" in name} == set(table)
    with torch.no_grad():
        for name, spec in table.items():
            parameters[name].copy_(case.cut(name, spec, case.reference[name]))
        case.note("lora logits", deviation(case.logits(model), case.columns(case.reference["lora logits"])))
    case.loss(model).backward()
    for name, spec in table.items():
        wanted = case.cut(name, spec, case.reference[f"lora grad.{name}"])
        case.note(f"lora grad {name}", deviation(parameters[name].grad, wanted))
    gradients = {name: parameters[name].grad for name in table}
    model.zero_grad(set_to_none=True)
    model.recompute = True
    case.loss(model).backward()
    case.note("lora recompute", max(deviation(parameters[name].grad, gradients[name]) for name in table))
    trained = [name for name, p in parameters.items() if p.grad is not None or p.requires_grad]
    case.note("lora trains other weights", len(set(trained) - set(table)))
    save_model(model, case.parallel, str(out / case.name), case.folder / "hf")


def check_entropy_helper(case: Case) -> None:
    """`response_logprobs` picks the rows before the responses: the same numbers as the whole's."""
    model = case.model()
    sequences = [Sequence(part.tolist(), min(1 + i % 2, len(part))) for i, part in enumerate(case.tokens.split(case.lengths))]
    batch = Batch.of(sequences, case.parallel.device)
    with torch.no_grad():
        logprobs, entropy = response_logprobs(model, batch, 0.7)
    logs = (case.reference["logits"] / 0.7).log_softmax(-1)
    rows = logs.split(case.lengths)
    parts = case.tokens.split(case.lengths)
    wanted = [r[s.prompt_length - 1 : -1].gather(1, t[s.prompt_length :, None])[:, 0] for r, t, s in zip(rows, parts, sequences)]
    inner = [r[s.prompt_length - 1 : -1] for r, s in zip(rows, sequences)]
    case.note("response logprobs", deviation(logprobs, torch.cat(wanted)))
    case.note("response entropy", deviation(entropy, torch.cat([-(r.exp() * r).sum(-1) for r in inner])))


def main(work: str, out: str) -> None:
    dist.set_debug_level(dist.DebugLevel.DETAIL)  # checks that every rank issues the same collectives
    parallel = start(timeout=120)
    out = Path(out)
    out.mkdir(exist_ok=True)
    deviations = {}
    for folder in sorted(path for path in Path(work).iterdir() if (path / "hf").is_dir()):
        case = Case(folder, parallel)
        if case.checkpoint.config.head == "score":
            check_scores(case)
        else:
            check_language_model(case)
            check_entropy_helper(case)
            if "lora logits" in case.reference:
                check_lora(case, out)
        deviations |= case.deviations
    parts = [None] * parallel.world_size
    dist.all_gather_object(parts, deviations)
    if parallel.is_main:
        worst = {check: max(part[check] for part in parts) for check in deviations}
        out.with_suffix(".json").write_text(json.dumps(worst))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
