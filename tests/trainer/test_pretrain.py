"""pretrain.py: the losses of a plain transformers loop on the raw documents, at any degree.

The reference takes the documents as lists, lays them end to end, cuts rows, and gives transformers
each row with its positions and its mask. Only which row comes when is the stream's own.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as RustTokenizer
from transformers import LlamaForCausalLM

from src.data.shards import Shards
from src.data.stream import Stream
from src.data.tokenization import Texts, tokenize
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.trainer.inputs import check_vocabulary
from tests.data.test_shards import CODE, LLAMA_3, byte_level, document_ids, rows_file
from tests.faults.harness import Run, hashes, kill_at_random
from tests.launch import launch, once, start
from tests.trainer.tiny import save_llama

ROW, BATCH, STEPS, SOME = 32, 4, 50, 8  # some: at several ranks
OPTIMIZER = dict(lr=5e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, max_grad_norm=1.0)
MASKS = {"masked": True, "across": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model with its tokenizer, and shards of texts."""
    base = tmp_path_factory.mktemp("pretrain")
    byte_level_file = byte_level(base, LLAMA_3)
    vocabulary = Tokenizer(byte_level_file).vocab_size
    save_llama(base / "model", vocab_size=vocabulary)
    byte_level_file.rename(base / "model" / "tokenizer.json")
    rng = random.Random(0)
    words = CODE.split()[:40]
    for name, count in (("a", 130), ("b", 40), ("held-out", 10)):
        texts = [" ".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(count)]
        rows_file(base / f"{name}.jsonl", texts)
        shards_of(base, name, base / name)
    return base


def shards_of(base: Path, name: str, target: Path) -> None:
    texts = Texts([str(base / f"{name}.jsonl")], "text", None, shard_tokens=900)
    tokenize(texts, Tokenizer(base / "model" / "tokenizer.json"), str(target))


def flags(**values) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def training(base: Path, save_dir: Path, mask: bool, dp: int = 1, **more) -> list[str]:
    values = dict(
        ckpt_dir=base / "model",
        train_file=f"{base / 'a'}:0.7,{base / 'b'}:0.3",
        save_dir=save_dir,
        document_mask=mask,
        max_seq_len=ROW,
        max_batch_size=BATCH // dp,
        max_steps=STEPS,
        schedule="constant",
        warmup=0,
        **OPTIMIZER,
    )
    return ["pretrain.py", *flags(**{**values, **more})]


def losses_in(save_dir: Path) -> list[float]:
    file = save_dir.with_name(save_dir.name + "-logs") / "pretrain.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    return [found[step] for step in sorted(found)]


@pytest.fixture(scope="module")
def runs(base):
    """runs(n): folders of what was trained on n ranks, by mask, with tensor and data parallelism.

    One launch for each n.
    """

    @once
    def at(n: int) -> Path:
        folder = base / f"at-{n}"
        folder.mkdir()
        commands = []
        for name, mask in MASKS.items():
            for tp in {1, n}:
                degree = {} if n == 1 else {"model_parallel_size": tp, "max_steps": SOME}
                target = folder / f"{name}-{tp}"
                commands.append(training(base, target, mask, n // tp, **degree))
        (folder / "commands.json").write_text(json.dumps(commands))
        launch(n, "tests/script_chain.py", str(folder / "commands.json"))
        return folder

    return at


def reference_losses(base: Path, mask: bool) -> list[float]:
    """A plain loop: transformers' Llama, PyTorch's AdamW."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(base / "model", attn_implementation="eager")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": decayed, "weight_decay": OPTIMIZER["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = OPTIMIZER["beta1"], OPTIMIZER["beta2"]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER["lr"], betas=betas, eps=1e-8)
    strings = {}
    for part, name in enumerate(("a", "b")):
        documents = document_ids(base / name)
        ids = [i for document in documents for i in document]
        owners = [number for number, document in enumerate(documents) for _ in document]
        strings[part] = torch.tensor(ids), torch.tensor(owners)
    order = Stream.open(f"{base / 'a'}:0.7,{base / 'b'}:0.3", ROW)
    losses = []
    for step in range(STEPS):
        total, count = torch.zeros(()), 0
        for number in range(step * BATCH, (step + 1) * BATCH):
            part, row, _ = order.place(number)
            ids, owners = (x[row * (ROW - 1) :][:ROW] for x in strings[part])
            n = len(ids)
            owners = owners if mask else torch.zeros_like(owners)
            same = owners[:, None] == owners[None, :]
            sees = same & torch.ones(n, n, dtype=torch.bool).tril()
            positions = torch.stack([same[i, :i].sum() for i in range(n)])
            bias = torch.zeros(n, n).masked_fill(~sees, torch.finfo(torch.float32).min)
            logits = model(
                ids[None], attention_mask=bias[None, None], position_ids=positions[None]
            ).logits[0]
            targets = torch.where(owners[1:] == owners[:-1], ids[1:], -100)
            total = total + F.cross_entropy(logits[:-1], targets, reduction="sum")
            count += int((targets != -100).sum())
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", MASKS)
def test_the_curve_is_that_of_a_plain_loop(base, runs, name):
    ours, theirs = losses_in(runs(1) / f"{name}-1"), reference_losses(base, MASKS[name])
    assert len(ours) == STEPS
    assert max(abs(a - b) for a, b in zip(ours, theirs)) <= 1e-4
    assert ours[-1] < ours[0] - 1


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_it_is_the_same_at_any_degree(runs, ranks, name):
    one = losses_in(runs(1) / f"{name}-1")
    for tp in (1, ranks):
        here = losses_in(runs(ranks) / f"{name}-{tp}")
        assert max(abs(a - b) for a, b in zip(one[:SOME], here, strict=True)) <= 1e-4, tp


def test_a_model_is_begun_from_a_config_alike_at_any_degree(base, tmp_path):
    config = {"config_file": base / "model" / "config.json", "max_steps": 2, "epochs": 1}
    config["tokenizer_file"] = base / "model" / "tokenizer.json"
    losses = []
    for ranks in (1, 2):
        command = training(base, tmp_path / f"{ranks}", True, **config)
        place = command.index("--ckpt_dir")
        launch(ranks, *command[:place], *command[place + 2 :])
        losses.append(losses_in(tmp_path / f"{ranks}"))
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 1e-5
    vocabulary = Tokenizer(base / "model" / "tokenizer.json").vocab_size
    assert abs(losses[0][0] - math.log(vocabulary)) < 1


def test_perplexity_is_that_of_transformers_by_source(base, tmp_path):
    valid = dict(valid_file=f"{base / 'held-out'},{base / 'b'}", keep_best="logprob", eval_every=2)
    launch(1, *training(base, tmp_path / "out", True, max_steps=2, **valid))
    lines = (tmp_path / "out-logs" / "pretrain.jsonl").read_text().splitlines()
    found = {}
    for line in map(json.loads, lines):
        found |= {key: line[key] for key in line if key.startswith("eval/")} | {}
        if "eval/b/perplexity" in found:
            break
    model = LlamaForCausalLM.from_pretrained(base / "model")
    for name in ("held-out", "b"):
        ids = [i for document in document_ids(base / name) for i in document]
        owners = [n for n, document in enumerate(document_ids(base / name)) for _ in document]
        total, count = 0.0, 0
        for first in range(0, len(ids) - 1, ROW - 1):
            row, of = ids[first : first + ROW], owners[first : first + ROW]
            for owner in sorted(set(of)):
                own = torch.tensor([[i for i, o in zip(row, of) if o == owner]])
                if own.shape[1] > 1:
                    with torch.no_grad():
                        logits = model(own).logits[0, :-1]
                    total += float(F.cross_entropy(logits, own[0, 1:], reduction="sum"))
                    count += own.shape[1] - 1
        assert found[f"eval/{name}/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (tmp_path / "out-best").is_dir()


def test_killed_at_random_it_takes_the_same_steps(base, tmp_path, request):
    """Every step's loss, and the weights to the bit; 20 kills with `make faults`."""
    options = dict(save_every=1, keep=1, max_steps=40, schedule="cosine")
    command = training(base, tmp_path / "whole", True, **options)
    launch(1, *command)
    command = training(base, tmp_path / "killed", True, **options)
    rng, kills = random.Random(0), 0
    wanted = 20 if request.config.getoption("--full-faults") else 3
    while True:
        run = Run(command, 1, tmp_path / "out.log")
        if kills < wanted:
            kills += kill_at_random(run, tmp_path / "killed-logs", rng, within=3)
        code = run.wait()
        if code == 0:
            break
    assert kills == wanted
    assert losses_in(tmp_path / "killed") == losses_in(tmp_path / "whole")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(train_file="a:0.7,b"), "give all one, or none"),
        (dict(train_file="{base}/model"), "is no folder of shards"),
        (dict(strict_length=True), "--strict_length True: has no effect"),
        (dict(epochs=2), "--epochs 2: has no effect with --max_steps"),
        (dict(ckpt_dir="{base}/other"), "with another vocabulary"),
        (dict(eval_every=2), "has no effect without --valid_file"),
        (dict(keep_best="accuracy", valid_file="{base}/b"), "the evaluation gives logprob"),
    ],
)
def test_what_is_wrong_is_named_before_any_work(base, tmp_path, change, reason):
    if not (base / "other").exists():
        (base / "deeper").mkdir(exist_ok=True)
        other = byte_level(base / "deeper", None)
        save_llama(base / "other", vocab_size=Tokenizer(other).vocab_size)
        other.rename(base / "other" / "tokenizer.json")
    change = {name: str(value).format(base=base) for name, value in change.items()}
    done = start(1, *training(base, tmp_path / "out", True, **change))
    assert done.returncode == 2 and reason in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_ids_that_the_model_has_no_embedding_for_are_refused(tmp_path):
    """Tensor-parallel embeddings would read them as zeros, in silence."""
    path = byte_level(tmp_path, None)
    rust = RustTokenizer.from_file(str(path))
    rust.add_special_tokens(["<pad>"])
    rust.save(str(path))
    tokenizer = Tokenizer(path)
    size = tokenizer.vocab_size - 1
    for name, text in (("with", "one <pad> two"), ("without", "one two")):
        (tmp_path / f"{name}.txt").write_text(text)
        texts = Texts([str(tmp_path / f"{name}.txt")], "text", None, 10**6)
        tokenize(texts, tokenizer, str(tmp_path / name))
    check_vocabulary(Stream.open(str(tmp_path / "without"), 4), tokenizer, size)
    stream = Stream.open(str(tmp_path / "with"), 4)
    with pytest.raises(UserError, match=f"with: holds '<pad>', id {size}, and the model, with"):
        check_vocabulary(stream, tokenizer, size)
    check_vocabulary(stream, tokenizer, size + 1)


def test_other_shards_are_another_run(base, tmp_path):
    """By what they hold, not by where they lie."""
    options = dict(save_every=1, max_steps=2)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a", "b"):
        shards_of(base, name, moved / name)
    assert Shards.open(moved / "a").digest == Shards.open(base / "a").digest
    launch(1, *training(base, tmp_path / "out", True, **options))
    blend = f"{moved / 'a'}:0.7,{moved / 'b'}:0.3"
    again = start(1, *training(base, tmp_path / "out", True, train_file=blend, **options))
    assert again.returncode == 0 and "finished after step 2" in again.stderr
    blend = f"{moved / 'a'}:0.6,{moved / 'b'}:0.4"
    other = start(1, *training(base, tmp_path / "out", True, train_file=blend, **options))
    assert other.returncode == 2 and "belongs to a run with other settings" in other.stderr
