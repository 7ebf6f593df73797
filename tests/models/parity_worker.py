"""One rank of test_parity.py: runs our model on what the test wrote, and notes every deviation.

    parity_worker.py WORK OUT

WORK holds a folder per case: `hf/`, a Hugging Face model, `grad/`, its gradients as a checkpoint of
the same kind, and `reference.safetensors`, with the tokens and what transformers made of them.
OUT.json gets {check: the largest deviation over the ranks}, models and what is compared between
degrees go to OUT/.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from src.checkpoint.load import load_model
from src.checkpoint.save import save_model, whole_adapter
from src.checkpoint.source import Checkpoint
from src.models.attention import Packed
from src.models.batch import (
    Batch,
    Sequence,
    response_logprobs,
    response_values,
    sequence_scores,
    weighted_balance_loss,
)
from src.models.layout import TensorSpec
from src.models.lora import LoRAConfig, add_lora, freeze_layers, lora_table
from src.parallel.setup import start, stop
from src.parallel.vocab import IMPOSSIBLE, token_logprobs
from src.trainer.optimizer import Optimizer

LORA = LoRAConfig(rank=3, alpha=8.0)
ATTENTION = ("wq", "wk", "wv", "wo")


def deviation(ours, reference, scale=None) -> float:
    """Largest difference relative to `scale`, the reference's largest entry by default.

    None counts as zeros.
    """
    ours = torch.zeros_like(reference) if ours is None else ours
    if ours.shape != reference.shape or not torch.isfinite(ours).all():
        return float("inf")
    worst = (ours.double() - reference.double()).abs().max().item() if ours.numel() else 0.0
    scale = reference.double().abs().max().item() if scale is None else scale
    return worst / scale if scale else float("inf") * worst if worst else 0.0


class Case:
    def __init__(self, folder: Path, parallel) -> None:
        self.folder, self.name, self.parallel = folder, folder.name, parallel
        self.reference = load_file(folder / "reference.safetensors")
        self.tokens, self.targets = self.reference["tokens"], self.reference["targets"]
        self.lengths = self.reference["lengths"].tolist()
        parts = [part.tolist() for part in self.parts(self.tokens)]
        self.sequences = [Sequence(part, min(1 + i % 2, len(part))) for i, part in enumerate(parts)]
        self.batch = Batch.of(self.sequences, parallel.device)
        self.checkpoint = Checkpoint.open(str(folder / "hf"))
        self.rank, self.n = parallel.mp_rank, parallel.mp_size
        self.deviations = {}

    def parts(self, rows):
        return rows.split(self.lengths)

    def model(self, **options):
        checkpoint = Checkpoint.open(str(self.folder / "hf"), **options)
        return load_model(checkpoint, self.parallel, torch.float32)

    def note(self, check: str, value: float) -> None:
        self.deviations[f"{self.name}/{check}"] = value

    def logits(self, model):
        return model.logits(model(self.tokens, Packed(self.lengths)))

    def note_logits(self, check: str, logits, whole) -> None:
        """Our columns, and nothing possible behind them.

        logits: [N, vocabulary / n, padded]; whole: [N, vocabulary].
        """
        first, end = TensorSpec((whole.size(-1),), 0).local_range(self.rank, self.n)
        ours, padding = logits[:, : end - first], logits[:, end - first :]
        self.note(check, deviation(ours, whole[:, first:end], whole.abs().max().item()))
        self.note(f"{check}, padding", (padding != IMPOSSIBLE).sum().item())

    def loss(self, model):
        return -token_logprobs(self.logits(model), self.targets)[0].mean()

    def note_gradient(self, check: str, gradient, spec: TensorSpec, whole) -> None:
        """This rank's part of a gradient, and exact zeros in its padding."""
        part = spec.cut(whole, self.rank, self.n)
        self.note(check, deviation(gradient, part, whole.abs().max().item()))
        if spec.dim is not None and gradient is not None:
            first, end = spec.local_range(self.rank, self.n)
            size = end - first
            padding = gradient.narrow(spec.dim, size, gradient.size(spec.dim) - size)
            self.note(f"padding of {check}", padding.abs().sum().item())

    def note_gradients(self, check: str, model, folder: str) -> None:
        wanted = Checkpoint.open(str(self.folder / folder))
        assert {name for name, _ in model.named_parameters()} == set(wanted.table)
        for name, parameter in model.named_parameters():
            spec, whole = wanted.table[name], wanted.read(name)
            self.note_gradient(f"{check} {name}", parameter.grad, spec, whole)

    def gradients_again(self, model, loss, **settings) -> dict:
        """Largest change of each gradient when it is computed once more.

        settings: the model's, other ones than before.
        """
        gradients = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        for name, value in settings.items():
            setattr(model, name, value)
        loss(model).backward()
        return {
            name: deviation(p.grad, gradients[name])
            for name, p in model.named_parameters()
            if p.grad is not None
        }

    def note_recompute(self, check: str, model, loss) -> None:
        """Largest change of any gradient when activations are recomputed."""
        self.note(check, max(self.gradients_again(model, loss, recompute="full").values()))


def check_language_model(case: Case) -> None:
    model = case.model()
    logits = case.logits(model)
    loss = -token_logprobs(logits, case.targets)[0].mean()
    loss.backward()
    logits = logits.detach()
    case.note_logits("logits", logits, case.reference["logits"])
    case.note("loss", deviation(loss.detach(), case.reference["loss"]))
    case.note_gradients("grad", model, "grad")
    case.note_recompute("recompute", model, case.loss)

    norm = Optimizer(model, case.parallel).step(0.0)["grad_norm"]  # of the gradients just computed
    case.note("norm", deviation(torch.tensor(norm), case.reference["norm"]))
    with torch.no_grad():
        ends = torch.tensor(case.lengths).cumsum(0).tolist()
        middle = slice(ends[1], ends[2])
        alone = model.logits(model(case.tokens[middle], Packed(case.lengths[2:3])))
        case.note("alone", deviation(alone, logits[middle]))
        others = (case.tokens + 1) % case.checkpoint.config.vocab_size
        others[middle] = case.tokens[middle]
        changed = model.logits(model(others, Packed(case.lengths)))[:, : model.vocabulary]
        logits = logits[:, : model.vocabulary]
        case.note("neighbours", deviation(changed[middle], logits[middle]))
        case.note("neighbours matter not, the tokens do", 1.0 / deviation(changed, logits))
    check_responses(case, model)


def check_responses(case: Case, model) -> None:
    """`response_logprobs` picks the rows before the responses: the same numbers as the whole's."""
    with torch.no_grad():
        logprobs, entropy = response_logprobs(model, case.batch, 0.7)
    rows = case.parts((case.reference["logits"] / 0.7).log_softmax(-1))
    # of each sequence: [response, vocabulary]
    inner = [row[s.prompt_length - 1 : -1] for row, s in zip(rows, case.sequences)]
    wanted = []
    for row, s in zip(inner, case.sequences):
        response = torch.tensor(s.tokens[s.prompt_length :], dtype=torch.long)
        wanted.append(row.gather(1, response[:, None])[:, 0])
    entropies = [-(row.exp() * row).sum(-1) for row in inner]
    case.note("response logprobs", deviation(logprobs, torch.cat(wanted)))
    case.note("response entropy", deviation(entropy, torch.cat(entropies)))


def check_frozen(case: Case) -> None:
    """Frozen layers have no gradient, and the others the same as ever."""
    model = case.model()
    case.loss(model).backward()
    freeze_layers(model, 1)
    again = case.gradients_again(model, case.loss, recompute="full")
    names = case.checkpoint.table.keys()
    frozen = {name for name in names if name.startswith(("tok_embeddings.", "layers.0."))}
    case.note("frozen", len(frozen ^ (names - again.keys())))
    case.note("beside the frozen", max(again.values()))


def check_balance(case: Case) -> None:
    """The load-balancing loss of each sequence, and the gradient of their weighted sum."""
    model = case.model()
    weights, coefficient = case.reference["weights"].tolist(), model.router_aux_loss_coef
    wanted = case.reference["balance"]  # [sequences]

    def loss(model):
        batch = Batch.of(case.sequences, case.parallel.device)
        model(batch.tokens, batch.layout)
        case.note("balance", deviation(batch.layout.balance_loss.detach(), wanted))
        return weighted_balance_loss(model, batch, weights, coefficient)

    total = loss(model)
    total.backward()
    weighted = (wanted * case.reference["weights"]).sum()
    case.note("balance, weighted", deviation(total.detach(), weighted))
    case.note_gradients("balance grad", model, "balance-grad")
    case.note_recompute("balance, recompute", model, loss)
    with torch.no_grad():
        model(case.batch.tokens, case.batch.layout)
    total = float(weighted_balance_loss(model, case.batch, weights, 1.0))
    case.note("balance without gradients", total)


def check_scores(case: Case) -> None:
    model = case.model()
    scores = sequence_scores(model, case.batch)
    case.note("scores", deviation(scores.detach(), case.reference["scores"]))
    (scores * case.reference["weights"]).sum().backward()
    case.note_gradients("grad", model, "grad")
    batch = Batch.of([Sequence(s.tokens, 1) for s in case.sequences], case.parallel.device)
    with torch.no_grad():
        before, last = response_values(model, batch)
    rows = case.parts(case.reference["every score"])
    case.note("values", deviation(before, torch.cat([row[:-1] for row in rows])))
    case.note("last values", deviation(last, torch.stack([row[-1] for row in rows])))


def check_lora(case: Case, out: Path) -> None:
    model = case.model()
    with torch.no_grad():
        base = case.logits(model)
    add_lora(model, LORA, 5, case.parallel)
    adapter = whole_adapter(model, case.parallel, LORA)
    save_whole(case, out / f"{case.name}-fresh.safetensors", adapter)
    with torch.no_grad():
        # B is zero (asserted on the saved factors); kernels round differently for slices of a
        # stacked product and for sums
        fresh = case.logits(model)
        case.note("lora starts as the base model", deviation(fresh, base))
        factors = [p for name, p in model.named_parameters() if name.endswith("lora_a")]
        for a in factors:
            a.mul_(1000)
        added = (case.logits(model) - fresh).abs().max().item()
        case.note("a fresh adapter adds exactly nothing", added)
        for a in factors:
            a.div_(1000)

    table, parameters = lora_table(model.config, LORA), dict(model.named_parameters())
    assert {name for name in parameters if "lora" in name} == set(table)
    with torch.no_grad():
        for name, spec in table.items():
            parameters[name].copy_(spec.cut(case.reference[name], case.rank, case.n))
    logits = case.logits(model)
    case.note_logits("lora logits", logits.detach(), case.reference["lora logits"])
    (-token_logprobs(logits, case.targets)[0].mean()).backward()
    squares = 0.0
    for name, whole in factor_gradients(case, table).items():
        case.note_gradient(f"lora grad {name}", parameters[name].grad, table[name], whole)
        squares += whole.double().square().sum()
    case.note_recompute("lora recompute", model, case.loss)
    trained = {name for name, p in parameters.items() if p.requires_grad}
    case.note("lora trains other weights", len(trained ^ set(table)))
    norm = Optimizer(model, case.parallel).step(0.0)["grad_norm"]
    case.note("lora norm", deviation(torch.tensor(norm), squares.sqrt()))
    save_model(model, case.parallel, str(out / case.name), case.checkpoint)
    check_dropout(case, out)
    if case.name == "mixtral":
        check_lora_of_attention(case, out)


def factor_gradients(case: Case, table: dict) -> dict:
    """Of W + scale · B A: scale · dW Aᵀ for B, and scale · Bᵀ dW for A."""
    dense, wanted = Checkpoint.open(str(case.folder / "lora-grad")), {}
    for name in table:
        stem, factor = name.rsplit(".", 1)
        gradient = dense.read(f"{stem}.weight") * LORA.scale  # [out, in], or of each expert
        if factor == "lora_b":
            wanted[name] = gradient @ case.reference[f"{stem}.lora_a"].mT  # [out, rank]
        else:
            wanted[name] = case.reference[f"{stem}.lora_b"].mT @ gradient  # [rank, in]
    return wanted


def given_factors(case: Case, lora: LoRAConfig) -> dict:
    return {name: case.reference[name] for name in lora_table(case.checkpoint.config, lora)}


def save_whole(case: Case, file: Path, tensors: dict) -> None:
    if case.parallel.is_main:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)


def whole_logits(case: Case, logits):
    parts = [torch.empty_like(logits) for _ in range(case.n)]  # each [N, vocabulary / n, padded]
    dist.all_gather(parts, logits.detach().contiguous(), group=case.parallel.mp_group)
    return TensorSpec((1, case.checkpoint.config.vocab_size), 1).join(parts)


def check_dropout(case: Case, out: Path) -> None:
    """What dropout makes of the logits and the factors' gradients.

    For the test to compare between degrees.
    """
    model, lora = case.model(), replace(LORA, dropout=0.4)
    add_lora(model, lora, 5, case.parallel, given_factors(case, lora))
    model.eval()
    with torch.no_grad():
        case.note_logits("dropout in evaluation", case.logits(model), case.reference["lora logits"])
    model.train()
    torch.manual_seed(7)
    logits = case.logits(model)
    (-token_logprobs(logits, case.targets)[0].mean()).backward()
    torch.manual_seed(7)
    case.note_recompute("dropout, recompute", model, case.loss)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad
    tensors = {"logits": whole_logits(case, logits), **whole_adapter(model, case.parallel, lora)}
    save_whole(case, out / f"{case.name}-dropout.safetensors", tensors)


def check_lora_of_attention(case: Case, out: Path) -> None:
    model, lora = case.model(), replace(LORA, targets=ATTENTION)
    add_lora(model, lora, 5, case.parallel, given_factors(case, lora))
    with torch.no_grad():
        logits = whole_logits(case, case.logits(model))
    save_whole(case, out / f"{case.name}-attention.safetensors", {"logits": logits})
    save_model(model, case.parallel, str(out / f"{case.name}-attention"), case.checkpoint)


def check_adapters(case: Case) -> None:
    """Adapters that `peft` saved, added to the weights as they are read."""
    for folder in sorted(case.folder.glob("peft-*")):
        model, wanted = case.model(adapter_dir=str(folder)), case.reference[folder.name]
        with torch.no_grad():
            if model.config.head == "score":
                case.note(folder.name, deviation(sequence_scores(model, case.batch), wanted))
            else:
                case.note_logits(folder.name, case.logits(model), wanted)


def main(work: str, out: str) -> None:
    if os.environ.get("WORLD_SIZE") == "2":
        # checks, slowly, that every rank issues the same collectives
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    parallel = start(timeout=120)
    torch.set_num_threads(1)  # tensors this small only wait for more
    out = Path(out)
    out.mkdir(exist_ok=True)
    deviations = {}
    for folder in sorted(path for path in Path(work).iterdir() if (path / "hf").is_dir()):
        case = Case(folder, parallel)
        if case.checkpoint.config.head == "score":
            check_scores(case)
        else:
            check_language_model(case)
            if "balance" in case.reference:
                check_balance(case)
            if "lora logits" in case.reference:
                check_frozen(case)
                check_lora(case, out)
        check_adapters(case)
        deviations |= case.deviations
    parts = [None] * parallel.world_size
    dist.all_gather_object(parts, deviations)
    if parallel.is_main:
        checks = sorted({check for part in parts for check in part})
        worst = {check: max(part.get(check, 0.0) for part in parts) for check in checks}
        out.with_suffix(".json").write_text(json.dumps(worst))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
