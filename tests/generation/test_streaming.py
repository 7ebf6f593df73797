"""Layers that come in turn give the same bits, and two of them are all that the device holds."""

import json
from collections import deque
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from src.checkpoint.load import load_model
from src.checkpoint.source import Checkpoint
from src.generation.runner import can_capture
from src.models.attention import Packed
from src.models.streaming import StreamedLayers, tensors_of
from src.parallel.host import aligned, storages_of
from src.trainer.budget import model_budget, streamed_bytes
from tests.launch import launch, once
from tests.models import families
from tests.test_scripts import call, flags, must, refused, rows_of

LENGTHS = [5, 1, 23, 9, 14, 2, 40, 9]  # of prompts: more than there are slots
PROMPTS = [[(7 * i + 5 * j) % 90 + 3 for j in range(n)] for i, n in enumerate(LENGTHS)]
SAMPLINGS = {
    "greedy": dict(temperature=0.0, max_new_tokens=6),
    "sampled": dict(temperature=1.3, max_new_tokens=6, seed=3),
}
MODELS = {  # what is loaded of which family, with how many layers
    "odd": ("llama", 5, {}),
    "even": ("qwen2-odd", 4, {}),
    "one layer": ("llama", 1, {}),
    "two layers": ("qwen3-odd", 2, {}),
    "bf16": ("qwen3-odd", 3, dict(dtype="bfloat16")),
    "window": ("mistral-odd", 3, {}),
    "experts": ("qwen3-moe", 3, {}),
    "experts in 4 bits": ("mixtral", 3, dict(quantize="nf4")),
    "8 bits": ("llama", 3, dict(quantize="int8")),
    "adapter": ("llama", 5, dict(adapter=True)),
    "adapter beside 4 bits": ("llama", 5, dict(quantize="nf4", adapter=True)),
    "verifier": ("llama", 3, dict(head="score")),
}
AT_TWO_RANKS = ("odd", "even", "experts", "adapter beside 4 bits")
RUNS = [(1, name) for name in MODELS] + [(2, name) for name in AT_TWO_RANKS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name → where the model lies, and how it is loaded."""
    root, sources = tmp_path_factory.mktemp("streamed"), {}
    for name, (family, layers, how) in MODELS.items():
        model = families.build(family, how.get("head") == "score", num_hidden_layers=layers)
        families.save(family, model, root / name)
        sources[name] = how | {"folder": str(root / name)}
        if how.get("adapter"):
            peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
            for weight in peft.parameters():
                if weight.requires_grad:
                    weight.data += 0.1 * torch.randn_like(weight)
            peft.save_pretrained(root / f"{name}, adapter")
            sources[name]["adapter"] = str(root / f"{name}, adapter")
    return sources


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("streamed-out")

    @once
    def run(n: int) -> dict:
        models = {name: folders[name] for ranks, name in RUNS if ranks == n}
        tasks, out = root / f"{n} tasks.json", root / f"{n}.json"
        tasks.write_text(json.dumps(dict(prompts=PROMPTS, samplings=SAMPLINGS, models=models)))
        launch(n, "tests/generation/streaming_worker.py", str(tasks), str(out))
        return json.loads(out.read_text())

    return run


@pytest.mark.parametrize("n, name", RUNS)
def test_it_changes_no_bit(results, n, name):
    plain, streamed = (results(n)[name][way] for way in ("plain", "streamed"))
    assert plain.keys() == streamed.keys() and len(plain) > 1
    for kind in plain.keys() - {"bytes"}:
        assert plain[kind] == streamed[kind], kind


@pytest.mark.parametrize("n, name", RUNS)
def test_the_device_holds_two_layers_and_the_ends(folders, results, n, name):
    source, layers = folders[name], MODELS[name][1]
    opened = Checkpoint.open(source["folder"], adapter_dir=source.get("adapter"))
    dtype, quantize = getattr(torch, source.get("dtype", "float32")), source.get("quantize")
    config = opened.config.with_head(source.get("head", "lm"))
    lora = opened.adapter.lora if opened.adapter and quantize else None
    device, host = streamed_bytes(config, n, dtype, quantize, lora)
    ours = results(n)[name]
    padding = 64 * 30  # of a layer's tensors
    assert device <= ours["streamed"]["bytes"] <= device + 2 * padding
    assert host <= ours["in host memory"] <= host + layers * padding
    if layers > 2 and lora is None:
        assert device < ours["plain"]["bytes"] == model_budget(config, n, dtype, quantize).weights


def whole_model(folders, parallel, name: str, streamed: bool):
    checkpoint = Checkpoint.open(folders[name]["folder"])
    return load_model(checkpoint, parallel, torch.float32, streamed=streamed).eval()


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    tokens = torch.tensor([token for prompt in PROMPTS for token in prompt])
    return model.logits(model(tokens, Packed(LENGTHS)))


@pytest.mark.parametrize("name", ("odd", "even"))
def test_a_forward_that_was_cut_short_leaves_nothing_behind(folders, parallel, name):
    model, wanted = (whole_model(folders, parallel, name, way) for way in (True, False))
    for number in range(len(model.layers)):

        def fail(*_):
            raise KeyboardInterrupt

        hook = model.layers.get_submodule(str(number)).register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            logits_of(model)
        hook.remove()
        assert torch.equal(logits_of(model), logits_of(wanted))


def test_what_layers_hold_is_of_two_buffers_alone(folders, parallel):
    model = whole_model(folders, parallel, "odd", True)
    streamed = model.streamed
    in_layers = storages_of(x for layer in model.layers for x in tensors_of(layer))
    assert in_layers.keys() == storages_of(streamed.buffers).keys() and len(in_layers) == 2
    sizes = [
        sum(aligned(s.nbytes()) for s in storages_of(tensors_of(layer)).values())
        for layer in whole_model(folders, parallel, "odd", False).layers
    ]
    assert streamed.device_bytes == 2 * max(sizes) and streamed.host_bytes == sum(sizes)
    assert not any(weight.requires_grad for weight in model.parameters())


class Stream:
    """Stands for a GPU's second stream, as late as it may be: it copies when it is waited for."""

    def __init__(self, *_) -> None:
        self.copies, self.saw_main, self.begun, self.done = deque(), False, 0, 0

    def wait_stream(self, _) -> None:
        self.saw_main = True

    def record_event(self) -> int:
        return self.begun

    def add(self, function, *args) -> None:
        assert self.saw_main, "what is computed in the buffer may not be over"
        self.saw_main, self.begun = False, self.begun + 1
        self.copies.append((function, args))

    def run_until(self, event: int) -> None:
        while self.done < event:
            function, args = self.copies.popleft()
            function(*args)
            self.done += 1

    def synchronize(self) -> None:
        self.run_until(self.begun)


class Copies(TorchDispatchMode):
    """Hands copies to a stream, and is told of nothing else."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.copy_.default:
            return function(*args, **(kwargs or {}))
        self.stream.add(function, *args)
        return args[0]


class Main:
    """Stands for the stream that computes."""

    def __init__(self, other: Stream) -> None:
        self.other = other

    def wait_event(self, event: int) -> None:
        self.other.run_until(event)


@pytest.mark.parametrize("name", ("odd", "even"))
def test_a_gpu_s_copies_are_waited_for_and_wait(folders, parallel, monkeypatch, name):
    """The branch of a GPU, whose second stream is as late as its events let it be."""
    model, wanted = (whole_model(folders, parallel, name, way) for way in (True, False))
    streamed, stream = model.streamed, Stream()

    @contextmanager
    def on(other):
        with Copies(other):
            yield

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Main(stream))
    streamed.stream = stream
    for buffer in streamed.buffers:
        buffer.fill_(255)  # NaN
    for number in range(2):
        streamed._bring(number)
    for forwards in range(1, 4):
        assert torch.equal(logits_of(model), logits_of(wanted))
        assert stream.begun == 2 + forwards * len(model.layers), "each layer comes once a forward"
    assert stream.begun - stream.done == 2, "the next forward's first layers are on their way"
    streamed.stream = None


def test_no_graph_is_captured_of_layers_that_come_in_turn(folders, parallel):
    on_gpu = replace(parallel, device=torch.device("cuda"))
    for streamed in (False, True):
        model = whole_model(folders, parallel, "odd", streamed)
        assert can_capture(model, on_gpu) is not streamed


def test_the_layers_are_read_to_host_memory(folders, parallel, monkeypatch):
    """Nothing of a layer is put anywhere else before all are there."""
    seen = []

    def look(self, layers, device):
        seen.extend(x.device.type for layer in layers for x in tensors_of(layer))
        raise InterruptedError

    monkeypatch.setattr(StreamedLayers, "__init__", look)
    on_meta = replace(parallel, device=torch.device("meta"))
    for name in ("odd", "experts"):
        checkpoint = Checkpoint.open(folders[name]["folder"])
        with pytest.raises(InterruptedError):
            load_model(checkpoint, on_meta, torch.float32, streamed=True)
        assert set(seen) == {"cpu"}
        seen.clear()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A solver of four layers, a verifier of its weights, and rows, as a user has them."""
    folder = tmp_path_factory.mktemp("streamed-scripts")
    must("dataset/build.py", "arithmetic", *flags(save_dir=folder / "data", n_train=30, n_test=5))
    rows = flags(train_file=folder / "data" / "train.json", save_dir=folder / "start")
    must("dataset/start.py", *rows, *flags(vocab_size=430, dim=32, n_layers=4, n_heads=4))
    pairs = folder / "data" / "verifier_train.json"
    start = flags(ckpt_dir=folder / "start", train_file=pairs, max_batch_size=60, lr=1e-9)
    must("verifier_train.py", *start, *flags(save_dir=folder / "verifier"))
    return folder


def test_scripts_write_the_same_with_it(tiny, tmp_path):
    rows, solver = tiny / "data" / "train.json", flags(ckpt_dir=tiny / "start")
    sampled = flags(temperature=1.1, max_new_tokens=6, max_rows=5, max_batch_size=3)
    best = flags(num_samples=3, best_of="verifier", reward_model_ckpt_dir=tiny / "verifier")
    greedy = flags(task="GSM8K", label_file=tiny / "data" / "test.json", max_new_tokens=6)
    judged = [*flags(ckpt_dir=tiny / "verifier", input_file=rows)]
    for way, more in (("plain", []), ("streamed", ["--offload_params"])):
        out = tmp_path / way
        out.mkdir()
        asked = [*solver, *flags(input_file=rows), *more]
        must("solver_generate.py", *asked, *sampled, *flags(output_file=out / "generated.jsonl"))
        must("solver_generate.py", *asked, *sampled, *best, *flags(output_file=out / "best.jsonl"))
        must("solver_score.py", *asked, *flags(output_file=out / "scored.jsonl"))
        must("verifier_evaluate.py", *judged, *more, *flags(output_file=out / "judged.jsonl"))
        must("solver_evaluate.py", *solver, *more, *greedy, *flags(log_dir=out / "logs"))
    names = ["generated.jsonl", "best.jsonl", "scored.jsonl", "judged.jsonl"]
    for name in (*names, "logs/predictions.jsonl"):
        plain, streamed = (rows_of(tmp_path / way / name) for way in ("plain", "streamed"))
        assert plain == streamed, name
    assert len(rows_of(tmp_path / "plain" / "judged.jsonl")) == 30


def test_the_dry_run_says_what_is_where(tiny, tmp_path):
    given = [*flags(ckpt_dir=tiny / "start", dtype="fp32"), "--dry_run"]
    config = Checkpoint.open(str(tiny / "start")).config
    whole = model_budget(config, 1, torch.float32).weights
    device, host = streamed_bytes(config, 1, torch.float32)
    assert host < whole and device == whole - host // 2
    out = must("solver_generate.py", *given).out
    assert f"{whole:,} on the device, all weights" in out and "host memory" not in out
    evaluated = [*given, *flags(task="GSM8K", max_seq_len=100)]
    for script, more in (("solver_generate.py", given), ("solver_evaluate.py", evaluated)):
        out = must(script, *more, "--offload_params").out
        assert f"{device:,} on the device, two layers and both ends" in out
        assert f"{host:,} in host memory, all 4 layers" in out
    cached = 2 * 4 * config.n_kv_heads * config.head_dim * 4 * 112  # seven pages
    assert f"keys and values of 100 tokens (--max_seq_len): {cached:,}" in out
    two = must("solver_generate.py", *given, "--offload_params", *flags(world_size=2)).out
    assert f"{streamed_bytes(config, 2, torch.float32)[0]:,} on the device" in two


@pytest.mark.parametrize("flag", ("--offload_params", "--dry_run", "--quantize=nf4"))
def test_texts_that_are_there_need_no_weights(tmp_path, flag):
    given = flags(task="GSM8K", label_file="a.json", log_dir=tmp_path, prediction_file="b.jsonl")
    done = call("solver_evaluate.py", *given, flag)
    refused(done, "has no effect with --prediction_file, without a model")
