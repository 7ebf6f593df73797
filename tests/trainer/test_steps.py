"""Whole training steps at every division of the ranks, against other software.

That is transformers, PEFT, and torch's own AdamW and clipping.
"""

import json
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from src.checkpoint.save import save_model
from src.checkpoint.source import Checkpoint
from src.models.lora import add_lora
from src.parallel.setup import start, stop
from src.trainer.batches import epoch_batches
from src.trainer.optimizer import Optimizer
from src.trainer.solver import SolverObjective
from tests.launch import launch
from tests.trainer import worker
from tests.trainer.conftest import LAYOUTS, everywhere
from tests.trainer.tiny import (
    apart,
    ours,
    padded,
    some_conversations,
    some_sequences,
    theirs,
    whole_weights,
)

TOLERANCE = 1e-5


def lr_of(step: int, total: int) -> float:
    """Linear warm-up over half the steps, then half a cosine; written from the formula."""
    warm = math.ceil(worker.WARMUP * total)
    if step < warm:
        return worker.LR * (step + 1) / warm
    return worker.LR * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2


def reference(model, loss_of, batches, with_muon=False):
    """Each step's (loss, gradient norm), and the weights after the first and the last.

    PEFT's adapters are merged in. with_muon: for the blocks' matrices, torch's own.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = [p for _, p in named]
    of_muon = [p for name, p in named if with_muon and "layers." in name and p.dim() == 2]
    others = [p for p in trained if all(p is not other for other in of_muon)]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": worker.WEIGHT_DECAY},
        {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.999), eps=1e-8)
    matrices = [{"params": of_muon, "weight_decay": worker.WEIGHT_DECAY}]
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
    steps, weights = [], []
    for step, rows in enumerate(batches):
        loss = loss_of(model, rows)
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, worker.MAX_GRAD_NORM)
        for group in (*adam.param_groups, *muon.param_groups):
            group["lr"] = lr_of(step, len(batches))
        adam.step()
        with in_their_own_numbers():
            muon.step()
        steps.append((float(loss.detach()), float(norm)))
        weights.append(merged(model))
    return {"steps": steps, "first": weights[0], "weights": weights[-1]}


def in_their_own_numbers():
    """Muon's products in the dtype of the matrices, where torch has them in bf16."""
    return mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone)


def merged(model) -> dict[str, torch.Tensor]:
    if not hasattr(model, "peft_config"):
        return unfused({name: p.detach().clone() for name, p in model.state_dict().items()})
    model.merge_adapter()
    state = {
        k: v.detach().clone()
        for k, v in model.get_base_model().state_dict().items()
        if "lora_" not in k
    }
    model.unmerge_adapter()
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items()}


def unfused(state: dict) -> dict[str, torch.Tensor]:
    """A matrix for each expert, as files have it; transformers has one tensor for all."""
    out = {}
    for name, tensor in state.items():
        stem, last = name.rsplit(".", 1)
        block = stem.replace("mlp.experts", "block_sparse_moe.experts")
        if last == "gate_up_proj":
            gate, up = tensor.chunk(2, 1)
            out |= {f"{block}.{e}.w1.weight": w for e, w in enumerate(gate)} | {
                f"{block}.{e}.w3.weight": w for e, w in enumerate(up)
            }
        elif last == "down_proj":
            out |= {f"{block}.{e}.w2.weight": w for e, w in enumerate(tensor)}
        else:
            out[name.replace("mlp.gate.", "block_sparse_moe.gate.")] = tensor
    return out


def experts_loss(model, rows):
    """solver_loss, and each sequence's load-balancing loss by transformers' formula.

    It is weighted like the output tokens.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    chosen, balance = [some_conversations(worker.ROWS)[i] for i in rows], 0.0
    for s in chosen:
        routers = model(input_ids=torch.tensor([s.tokens]), output_router_logits=True).router_logits
        config = model.config
        one = load_balancing_loss_func(
            routers, config.num_local_experts, config.num_experts_per_tok
        )
        balance = balance + one * s.response_length / sum(s.response_length for s in chosen)
    return solver_loss(model, rows) + model.config.router_aux_loss_coef * balance


def solver_loss(model, rows):
    """The mean over output tokens: prompts, others' tokens and pads carry the label -100."""
    sequences = some_conversations(worker.ROWS)
    chosen = [sequences[i] for i in rows]
    ids, mask = padded([s.tokens for s in chosen])
    labels = ids.masked_fill(mask == 0, -100)
    for row, sequence in zip(labels, chosen):
        is_trained = torch.zeros(len(row), dtype=torch.bool)
        for first, last in sequence.ranges:
            is_trained[first:last] = True
        row[~is_trained] = -100
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def verifier_loss(model, rows):
    """-log sigmoid(chosen - rejected), the mean over a comparison's pairs, and over these."""
    total = 0.0
    for comparison in (worker.comparisons()[i] for i in rows):
        ids, mask = padded([s.tokens for s in comparison.responses])
        scores = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        n = len(comparison.chosen)
        pairs = [-torch.log(1 / (1 + torch.exp(r - c))) for c in scores[:n] for r in scores[n:]]
        total = total + sum(pairs) / len(pairs)
    return total / len(rows)


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    solver_batches = epoch_batches(worker.ROWS, worker.BATCH, worker.SEED, 1)
    verifier_batches = epoch_batches(worker.COMPARISONS, worker.VERIFIER_BATCH, worker.SEED, 1)
    return {
        "full": reference(theirs(folder / "lm").double(), solver_loss, solver_batches),
        "lora": reference(
            peft_model(folder, tmp_path_factory.mktemp("adapter")), solver_loss, solver_batches
        ),
        "experts": reference(theirs(folder / "experts"), experts_loss, solver_batches),
        "muon": reference(theirs(folder / "lm"), solver_loss, solver_batches, with_muon=True),
        "verifier": reference(theirs(folder / "score").double(), verifier_loss, verifier_batches),
    }


def peft_model(folder, saved):
    """PEFT's model with our adapter as it starts: random A, zero B."""
    from peft import PeftModel

    parallel = start(1)
    model = ours(folder / "lm", parallel)
    add_lora(model, worker.LORA, worker.LORA_SEED, parallel)
    save_model(model, parallel, str(saved / "start"), Checkpoint.open(str(folder / "lm")))
    stop()
    return PeftModel.from_pretrained(
        theirs(folder / "lm"), saved / "start" / "adapter", is_trainable=True
    )


RUNS = [*worker.SOLVER_RUNS, *worker.METHOD_RUNS, *worker.VERIFIER_RUNS]
# Whose reference is one rank's run: the model has one elsewhere, and so has the method.
AS_ONE_RANK = [run for run in RUNS if run.startswith(("experts, lora", "muon of"))]


@everywhere([run for run in RUNS if run not in AS_ONE_RANK])
def test_losses_norms_and_weights_are_the_reference_s(results, expected, layout, run):
    got, want = results[layout][run], expected[run.split(",")[0]]
    assert len(got["history"]) == len(want["steps"])
    for number, (step, (loss, norm)) in enumerate(zip(got["history"], want["steps"])):
        assert step["loss"] == pytest.approx(loss, rel=TOLERANCE)
        assert step["grad_norm"] == pytest.approx(norm, rel=TOLERANCE)
        assert step["lr"] == pytest.approx(lr_of(number, len(want["steps"])), rel=1e-12)
        assert step["skipped"] == 0
    assert apart(got["first"], want["first"]) < TOLERANCE
    assert apart(got["weights"], want["weights"]) < TOLERANCE


@everywhere(AS_ONE_RANK)
def test_adapters_of_experts_and_muon_of_others_train_alike_at_any_division(results, layout, run):
    """Their loss and gradients are tested with the model.

    Here all ranks take the steps that one rank takes.
    """
    first = "experts, lora" if run.startswith("experts, lora") else run.split(",")[0]
    got, one = results[layout][run], results["one rank"][first]
    for step, other in zip(got["history"], one["history"]):
        assert step["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=TOLERANCE)
    assert apart(got["weights"], one["weights"]) < TOLERANCE
    assert apart(got["weights"], got["first"]) > 30 * TOLERANCE


def test_the_runs_above_train_and_clip(expected, folder):
    """Otherwise they would agree on nothing.

    Every matrix moves far more than the tolerance, and norms are clipped.
    """
    for run, name in (
        ("full", "lm"),
        ("lora", "lm"),
        ("verifier", "score"),
        ("experts", "experts"),
    ):
        before = unfused(dict(theirs(folder / name).named_parameters()))
        moved = {
            k: float((v - before[k]).norm() / before[k].norm())
            for k, v in expected[run]["weights"].items()
        }
        moving = [k for k in moved if "_proj" in k] if run == "lora" else moved
        assert min(moved[k] for k in moving) > 30 * TOLERANCE
        assert any(norm > worker.MAX_GRAD_NORM for _, norm in expected[run]["steps"])


@everywhere(RUNS)
def test_replicated_weights_stay_the_same_bits_on_every_rank(results, layout, run):
    assert results[layout][run]["alike"]


def test_each_data_parallel_rank_keeps_its_share_of_the_optimizer_s_state(results, layout):
    """And of the fp32 masters; the weights are the same bits as with all of it on every rank."""
    state, (ranks, mp) = results[layout]["state"], map(int, LAYOUTS[layout].split("-"))
    whole = (state["numbers"], state["numbers"])
    assert state[0]["held"] == [whole] * ranks
    shares = [
        state[1]["held"][rank::mp] for rank in range(mp)
    ]  # of the ranks that hold the same part of the model
    assert all(tuple(map(sum, zip(*share))) == whole for share in shares)
    assert max(held for held, _ in state[1]["held"]) <= whole[0] * (0.75 if ranks > mp else 1)
    assert all(
        torch.equal(state[0]["weights"][n], state[1]["weights"][n]) for n in state[0]["weights"]
    )


def test_shared_weights_take_the_bytes_that_were_planned(results, layout):
    for found in results[layout]["state"]["shared"].values():
        kept, planned = found["kept"]
        assert kept == planned
        if "DP" in layout:
            put_together, counted = found["put together"]
            assert 0.6 * counted < put_together < 1.01 * counted


def test_recomputed_activations_change_nothing(results, layout):
    a, b = results[layout]["full"], results[layout]["full, micro-batches, recomputed"]
    assert apart(a["weights"], b["weights"]) < 1e-6


def test_evaluation_is_called_before_the_first_and_after_every_epoch(results):
    assert results["one rank"]["full"]["evaluated"] == [0, 1]


def test_accuracy_of_a_verifier_step_is_the_share_of_pairs_ranked_right(results, layout, folder):
    """At the first step, whose weights are known."""
    model, rows = (
        theirs(folder / "score"),
        epoch_batches(worker.COMPARISONS, worker.VERIFIER_BATCH, worker.SEED, 1)[0],
    )
    shares = []
    for c in (worker.comparisons()[i] for i in rows):
        ids, mask = padded([s.tokens for s in c.responses])
        with torch.no_grad():
            scores = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).tolist()
        pairs = [a > b for a in scores[: len(c.chosen)] for b in scores[len(c.chosen) :]]
        shares.append(sum(pairs) / len(pairs))
    for run in results[layout].keys() & worker.VERIFIER_RUNS:
        assert results[layout][run]["history"][0]["accuracy"] == pytest.approx(
            sum(shares) / len(shares), abs=1e-6
        )


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(results, layout):
    """Ours whole or another rank's shard.

    All skip, all say so, no weight moves, and the next step is as if it had not been.
    """
    ranks = results[layout]["poisoned"]["ranks"]
    assert len(ranks) == int({"one rank": 1, "TP 2": 2, "DP 2": 2}.get(layout, 4))
    for skipped, norms, unchanged in ranks:
        assert skipped == [0, 1, 1, 0] and unchanged == [True, True, False]
        assert [math.isfinite(norm) for norm in norms] == [True, False, False, True]
    assert (
        apart(results[layout]["poisoned"]["weights"], results["one rank"]["poisoned"]["weights"])
        < TOLERANCE
    )


def test_after_skipped_steps_training_goes_on_as_without_them(results, folder):
    parallel = start(1)
    model = ours(folder / "lm", parallel)
    optimizer, objective = (
        Optimizer(model, parallel),
        SolverObjective(some_sequences(4), parallel.device),
    )
    for _ in range(2):
        optimizer.backward(objective.loss(model, [0, 1, 2, 3], sum(objective.weights))[0])
        optimizer.step(1e-3)
    weights = whole_weights(model, parallel)
    stop()
    assert apart(results["one rank"]["poisoned"]["weights"], weights) < 1e-7


def test_every_pair_counts_at_any_division(results, layout):
    assert results[layout]["pairs"]["alike"]
    ours_, one = results[layout]["pairs"], results["one rank"]["pairs"]
    assert {k: ours_["summary"][k] for k in ("n", "pairs", "accuracy")} == {
        k: one["summary"][k] for k in ("n", "pairs", "accuracy")
    }
    for a, b in zip(ours_["rows"], one["rows"]):
        for side in ("chosen", "rejected"):
            assert a[side] == pytest.approx(b[side], rel=TOLERANCE, abs=TOLERANCE)


def test_dropout_follows_the_seed_at_any_degree(folder, tmp_path):
    """By the scripts' own preparation: in fresh processes, alone and as two ranks of one model."""
    losses = []
    for n, name in ((1, "a"), (1, "b"), (2, "c")):
        launch(n, "tests/trainer/dropout_worker.py", str(folder / "lm"), str(tmp_path / name))
        losses.append(json.loads((tmp_path / name).read_text()))
    assert losses[0] == losses[1] and losses[0][0] == losses[0][1] != losses[0][2]
    assert losses[2] == pytest.approx(losses[0], rel=TOLERANCE)
