"""Shards of a model in stages: bit for bit there and back, read at any layout, holes refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.checkpoint.plan import dry_run
from src.checkpoint.shards import Place
from src.checkpoint.source import Checkpoint
from src.checkpoint.verify import reports_of
from src.checkpoint.write import merge, split
from src.errors import UserError
from src.models.hf_config import PRESETS
from src.models.stages import cut_in_stages
from tests.checkpoint.stages_worker import LAYOUTS
from tests.checkpoint.test_adapter import ADAPTERS, merged_logits, trained
from tests.checkpoint.tiny import assert_same, meta_tensors, read_hf, write_hf
from tests.launch import launch, once, start
from tests.test_scripts import flags, must, same_bits

IDS = {"bos_token_id": 1, "eos_token_id": 2}
MODELS = {  # name → how `write_hf` makes it
    "llama": dict(name="llama", num_hidden_layers=5),
    "tied": dict(name="qwen2-tied", num_hidden_layers=5),
    "experts": dict(name="mixtral", num_hidden_layers=4, dtype=torch.bfloat16),
    "fused experts": dict(name="qwen3-moe", num_hidden_layers=4),
    "verifier": dict(name="qwen3", num_hidden_layers=4, verifier=True),
}
CUTS = ((2, 2), (3, 3), (4, 2), (6, 3), (8, 4))  # (shards in all, stages)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model's folder and what a plain, whole one holds: made(name) → (folder, tensors)."""
    work, known = tmp_path_factory.mktemp("made"), {}

    def make(name: str) -> tuple[Path, dict]:
        if name not in known:
            known[name] = work / name, write_hf(work / name, **MODELS[name])
        return known[name]

    return make


def shard_of(folder: Path, stages: int, stage: int, rank: int) -> dict:
    return torch.load(folder / Place(stages, stage, rank).file_name)


# --- there and back


@pytest.mark.parametrize("n, stages", CUTS)
@pytest.mark.parametrize("name", MODELS)
def test_split_in_stages_and_merged_is_bit_for_bit(tmp_path, made, name, n, stages):
    hf, wanted = made(name)
    source, ranks = Checkpoint.open(str(hf)), n // stages
    split(source, tmp_path / "stages", n, stages=stages)
    split(source, tmp_path / "plain", ranks)
    # Stages divide each plain shard among them: nothing twice, nothing left.
    for rank in range(ranks):
        plain = torch.load(tmp_path / "plain" / f"consolidated.{rank:02d}.pth")
        parts = [shard_of(tmp_path / "stages", stages, stage, rank) for stage in range(stages)]
        assert sum(map(len, parts)) == len(plain)
        assert_same({key: tensor for part in parts for key, tensor in part.items()}, plain)
    assert len(list((tmp_path / "stages").glob("consolidated*"))) == n
    # Merged; cut otherwise; and joined to plain shards.
    cut = Checkpoint.open(str(tmp_path / "stages"))
    assert cut.config == source.config and cut.dtype == source.dtype and cut.stages == stages
    merge(cut, tmp_path / "back", IDS)
    assert_same(read_hf(tmp_path / "back"), wanted)
    for other, of_stages in ((2, 2), (3, 1)):
        split(cut, tmp_path / "again", other, stages=of_stages)
        split(source, tmp_path / "direct", other, stages=of_stages)
        files = sorted(path.name for path in (tmp_path / "direct").glob("consolidated*"))
        assert files == sorted(path.name for path in (tmp_path / "again").glob("consolidated*"))
        for file in files:
            assert_same(
                torch.load(tmp_path / "again" / file), torch.load(tmp_path / "direct" / file)
            )


@pytest.mark.parametrize(
    "name, wanted",
    (  # the head costs as much as a third of a layer
        ("llama", ["tok_embeddings layers.0 layers.1 layers.2", "layers.3 layers.4 norm output"]),
        ("tied", ["tok_embeddings layers.0 layers.1 layers.2", "layers.3 layers.4 norm"]),
        ("verifier", ["tok_embeddings layers.0 layers.1", "layers.2 layers.3 norm score"]),
    ),
)
def test_the_manifest_says_what_is_where(tmp_path, made, name, wanted):
    split(Checkpoint.open(str(made(name)[0])), tmp_path / "cut", 4, stages=2)
    assert sorted(path.name for path in (tmp_path / "cut").glob("consolidated*")) == [
        "consolidated.stage-00-of-02.00.pth",
        "consolidated.stage-00-of-02.01.pth",
        "consolidated.stage-01-of-02.00.pth",
        "consolidated.stage-01-of-02.01.pth",
    ]
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    assert [" ".join(modules) for modules in manifest["stages"]] == wanted
    for stage, modules in enumerate(manifest["stages"]):
        for rank in range(2):
            keys = shard_of(tmp_path / "cut", 2, stage, rank)
            assert {".".join(key.split(".")[: 1 + ("layers" in key)]) for key in keys} == set(
                modules
            )


def test_stages_in_safetensors_are_read_too(tmp_path, made):
    hf, tensors = made("llama")
    split(Checkpoint.open(str(hf)), tmp_path, 4, stages=2)
    for file in tmp_path.glob("consolidated*"):
        save_file(torch.load(file), file.with_suffix(".safetensors"))
        file.unlink()
    (tmp_path / "manifest.json").unlink()
    whole, cut = meta_tensors(tensors), Checkpoint.open(str(tmp_path))
    assert_same({key: cut.read(key) for key in cut.table}, whole)


def test_an_adapter_goes_along(tmp_path):
    """On a model in stages it adds the same, and is split into stages with it."""
    write_hf(tmp_path / "hf", "llama")
    trained(tmp_path / "adapter", "llama", ADAPTERS["patterns"])
    split(Checkpoint.open(str(tmp_path / "hf")), tmp_path / "cut", 4, stages=2)
    adapter = str(tmp_path / "adapter")
    whole = Checkpoint.open(str(tmp_path / "hf"), adapter_dir=adapter)
    on_stages = Checkpoint.open(str(tmp_path / "cut"), adapter_dir=adapter)
    split(whole, tmp_path / "both", 4, stages=2)
    both = Checkpoint.open(str(tmp_path / "both"))
    for name in whole.table:
        assert torch.equal(on_stages.read(name), whole.read(name)), name
        assert torch.equal(both.read(name), whole.read(name)), name
    expected = merged_logits(tmp_path / "hf", tmp_path / "adapter", tmp_path / "a")
    logits = merged_logits(tmp_path / "cut", tmp_path / "adapter", tmp_path / "b")
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("model_type", ("llama-2-70b", "qwen2.5-0.5b"))
@pytest.mark.parametrize("stages", (2, 4))
def test_a_dry_run_counts_what_each_stage_holds(model_type, stages):
    plan = dry_run(PRESETS[model_type], 8, torch.bfloat16, stages)
    plain = dry_run(PRESETS[model_type], 8 // stages, torch.bfloat16)
    assert sum(map(plan.rank_bytes, range(stages))) == plain.rank_bytes(0)
    text = "\n".join(plan.lines())
    assert f"stage {stages - 1} of {stages}, layers " in text
    assert f"{plan.rank_bytes(1):,} bytes" in text


# --- loaded at any layout


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, made):
    """Runs the worker on n ranks: loaded(n) → the folder with what they hold."""
    work = tmp_path_factory.mktemp("loaded")

    @once
    def run(n: int) -> Path:
        out, folders = work / f"of-{n}", []
        out.mkdir()
        for name in MODELS:
            split(Checkpoint.open(str(made(name)[0])), out / f"{name} in stages", 6, stages=3)
            folders.append(f"{name}={out / f'{name} in stages'}")
        launch(n, "tests/checkpoint/stages_worker.py", str(out), *folders)
        return out

    return run


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", (2, 4))
def test_ranks_of_any_layout_get_their_part(made, loaded, name, ranks):
    """2 shards in each of 3 stages, at other degrees and stages: the whole's part, bit for bit."""
    hf, tensors = made(name)
    whole = {key: x.float() for key, x in meta_tensors(tensors, stacked=True).items()}
    out, source = loaded(ranks), Checkpoint.open(str(hf))
    folder, tied = out / f"{name} in stages", source.config.tie_word_embeddings
    written = cut_in_stages(source.config, 3)
    for mp_size, pp_size in LAYOUTS[ranks]:
        stages = cut_in_stages(source.config, pp_size)
        for rank in range(ranks):
            stem = f"{name}.{mp_size}-{pp_size}.{rank}"
            mp_rank, stage = rank % mp_size, rank // mp_size % pp_size
            expected = {
                key: spec.cut(whole[key], mp_rank, mp_size)
                for key, spec in source.table.items()
                if stage in stages.holders(key, tied)
            }
            assert_same(load_file(out / f"{stem}.safetensors"), expected)
            # Of files in which nothing is its own, it reads nothing.
            own = {holder for key in expected for holder in written.holders(key, tied=False)}
            read = json.loads((out / f"{stem}.json").read_text())
            assert {Place.of(folder / file).stage for file in read} == own
        # Saved by a pipeline, too, they are plain shards, one for each model-parallel rank.
        saved = out / f"{name}.{mp_size}-{pp_size}-saved"
        assert len(list(saved.glob("consolidated.??.pth"))) == mp_size
        again, dtype = Checkpoint.open(str(saved)), source.dtype
        assert again.stages == 1 and again.dtype == dtype
        assert_same(
            {key: again.read(key) for key in again.table},
            {key: whole[key].to(dtype) for key in source.table},
        )


# --- the scripts


def test_every_script_computes_the_same_from_stages(tmp_path):
    """Texts, predictions, and the weights that a verifier's and PPO's training end with."""
    data, train_file = tmp_path / "data", tmp_path / "data" / "train.json"
    must("dataset/build.py", "arithmetic", *flags(save_dir=data, n_train=24, n_test=4))
    sizes = dict(vocab_size=420, dim=32, n_layers=3, n_heads=4)
    must("dataset/start.py", *flags(train_file=train_file, save_dir=tmp_path / "start", **sizes))
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    for folder, model, verifier in (
        (plain, dict(n=1), dict(n=2)),
        (cut, dict(n=4, stages=2), dict(n=3, stages=3)),
    ):
        start_from = flags(ckpt_file=tmp_path / "start", save_path=folder / "model", **model)
        must("checkpoint_split.py", *start_from)
        generated = flags(
            ckpt_dir=folder / "model",
            input_file=train_file,
            max_rows=4,
            output_file=folder / "samples.jsonl",
            max_new_tokens=6,
        )
        must("solver_generate.py", *generated)
        evaluated = flags(
            ckpt_dir=folder / "model",
            task="GSM8K",
            label_file=data / "test.json",
            log_dir=folder / "evaluated",
            max_new_tokens=6,
        )
        must("solver_evaluate.py", *evaluated)
        trained_verifier = flags(
            ckpt_dir=folder / "model",
            save_dir=folder / "trained",
            train_file=data / "verifier_test.json",
            max_batch_size=4,
            lr=1e-3,
        )
        must("verifier_train.py", *trained_verifier)
        split_verifier = flags(
            ckpt_file=folder / "trained", save_path=folder / "verifier", **verifier
        )
        must("checkpoint_split.py", *split_verifier)
        reinforced = flags(
            actor_ckpt_dir=folder / "model",
            actor_save_dir=folder / "policy",
            critic_ckpt_dir=folder / "verifier",
            critic_save_dir=folder / "value",
            reward_model_ckpt_dir=folder / "verifier",
            train_file=train_file,
            max_batch_size=4,
            max_buffer_size=4,
            iterations=1,
            max_new_tokens=6,
            lr=1e-3,
        )
        must("ppo_train.py", *reinforced)
    for file in ("samples.jsonl", "evaluated/predictions.jsonl"):
        assert (plain / file).read_text() == (cut / file).read_text()
    for model in ("model", "trained", "verifier", "policy", "value"):
        assert same_bits(plain / model, cut / model), model
    assert not same_bits(plain / "policy", plain / "model")


# --- what is wrong


def swap(folder: Path, *pairs: tuple[tuple, tuple]) -> None:
    """Swap files, by their (stage, rank)."""
    for a, b in pairs:
        first, second = (folder / Place(2, *place).file_name for place in (a, b))
        first.rename(folder / "aside")
        second.rename(first)
        (folder / "aside").rename(second)


def remove(folder: Path, *places: tuple[int, int]) -> None:
    for place in places:
        (folder / Place(2, *place).file_name).unlink()


def edit(folder: Path, change, *places: tuple[int, int], manifest: bool = False) -> None:
    """Change files' tensors; manifest: whether it is left there."""
    for place in places:
        file = folder / Place(2, *place).file_name
        tensors = torch.load(file)
        change(tensors)
        torch.save(tensors, file)
    if not manifest:
        (folder / "manifest.json").unlink()


def without_layer(tensors: dict) -> None:
    for key in [key for key in tensors if key.startswith("layers.2.")]:
        del tensors[key]


def without_one(tensors: dict) -> None:
    del tensors["layers.3.attention.wo.weight"]


def with_another(tensors: dict) -> None:
    tensors["layers.3.ffn_norm.weight"] = torch.ones(66)


def flip(folder: Path) -> None:
    file = folder / Place(2, 1, 0).file_name
    data = file.read_bytes()
    file.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])


def from_other(folder: Path, name: str) -> None:
    """A file of the same model in another cut, or of a model trained otherwise, in its place."""
    shutil.copyfile(folder.parent / "others" / name, folder / name)


def manifest_of(folder: Path, stages: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text()) | {"stages": stages}
    (folder / "manifest.json").write_text(json.dumps(manifest))


S = "consolidated.stage-0{}-of-02.0{}.pth".format
FIX = "copy the files of one split here, or split the model again"
WRONG = {  # what happens to 2 shards in each of 2 stages, and what is said
    "a file is missing": (lambda f: remove(f, (1, 0)), [f"{S(1, 0)} missing; 3 of 4 shards", FIX]),
    "a stage is missing": (
        lambda f: remove(f, (0, 0), (0, 1)),
        [f"{S(0, 0)}, {S(0, 1)} missing", "(stage 1 has 2, stage 0 has 0)", FIX],
    ),
    "stages of other degrees": (
        lambda f: remove(f, (1, 1)),
        [f"{S(1, 1)} missing; 3 of 4", "(stage 0 has 2, stage 1 has 1)", FIX],
    ),
    "no such stage": (
        lambda f: (f / S(1, 1)).rename(f / S(2, 1)),
        [f"{S(2, 1)}: 2 stages are counted from 0, there is no stage 2", FIX],
    ),
    "a file of another split": (
        lambda f: from_other(f, "consolidated.stage-00-of-03.00.pth"),
        [f"{S(0, 0)} is of a split in 2 stages, consolidated.stage-00-of-03.00.pth of one in 3"],
    ),
    "plain shards, too": (
        lambda f: from_other(f, "consolidated.00.pth"),
        [f"consolidated.00.pth is of a split in 1 stage, {S(1, 1)} of one in 2; remove"],
    ),
    "a file twice": (
        lambda f: (f / S(0, 1)).rename(f / "consolidated.stage-0-of-2.00.pth"),
        [f"consolidated.stage-0-of-2.00.pth and {S(0, 0)} are both shard 0 of stage 0"],
    ),
    "damaged": (flip, [f"{S(1, 0)}: its SHA-256 is not that of what was written: damaged"]),
    "cut short": (
        lambda f: (f / S(1, 0)).write_bytes((f / S(1, 0)).read_bytes()[:3000]),
        [f"{S(1, 0)}: cannot be read as pth"],
    ),
    "of another run": (
        lambda f: from_other(f, S(1, 0)),
        [f"{S(1, 0)}: its SHA-256 is not that of what was written: damaged"],
    ),
    "stages swapped": (
        lambda f: swap(f, ((0, 0), (1, 0)), ((0, 1), (1, 1))),
        [f"{S(0, 0)}: lacks layers.0, layers.1, layers.2, tok_embeddings and holds layers.3", FIX],
    ),
    "ranks swapped": (
        lambda f: swap(f, ((0, 0), (0, 1))),
        [f"{S(0, 0)}: its SHA-256 is not that of what was written: that is {S(0, 1)}'s, are they"],
    ),
    "shards of two stages swapped": (
        lambda f: swap(f, ((0, 0), (1, 1))),
        [f"{S(0, 0)} and {S(1, 0)} both hold", FIX],
    ),
    "a layer lost": (
        lambda f: edit(f, without_layer, (0, 0), (0, 1)),
        ["none of its 2 stages holds layers.2, which its config describes", FIX],
    ),
    "a layer lost, with the manifest": (
        lambda f: edit(f, without_layer, (0, 0), (0, 1), manifest=True),
        [f"{S(0, 0)}: lacks layers.2, other than manifest.json says", FIX],
    ),
    "a tensor lost": (
        lambda f: edit(f, without_one, (1, 1)),
        ["shard 1 of 2: layers.3.attention.wo.weight is missing", FIX],
    ),
    "a tensor in two stages": (
        lambda f: edit(f, with_another, (0, 1)),
        [f"{S(0, 1)} and {S(1, 1)} both hold layers.3.ffn_norm.weight", FIX],
    ),
    "a manifest of another split": (
        lambda f: manifest_of(f, [["tok_embeddings"], ["layers.0"], ["norm"]]),
        [f"{S(0, 0)}: is of a split in 2 stages, manifest.json is of one in 3", FIX],
    ),
    "a manifest that names no stages": (
        lambda f: manifest_of(f, None),
        ["manifest.json: its list of stages is missing or damaged", FIX],
    ),
    "a manifest that is damaged": (
        lambda f: manifest_of(f, [["norm"], [7]]),
        ["manifest.json: its list of stages is missing or damaged", FIX],
    ),
}
SCRIPTS = {  # a script to which the folder is given: its flags
    "checkpoint_merge.py": dict(ckpt_dir="{}", save_dir="out"),
    "checkpoint_split.py": dict(ckpt_file="{}", save_path="out", n=2),
    "checkpoint_verify.py": dict(ckpt_dir="{}"),
    "solver_generate.py": dict(ckpt_dir="{}", input_file="rows.json", output_file="out.jsonl"),
}


@pytest.fixture
def cut(tmp_path, made) -> Path:
    """2 shards in each of 2 stages; in `others` some of another cut, or of another model."""
    source, others = Checkpoint.open(str(made("llama")[0])), tmp_path / "others"
    others.mkdir()
    for n, stages in ((1, 1), (3, 3)):
        split(source, tmp_path / "again", n, stages=stages)
        for file in (tmp_path / "again").glob("consolidated*"):
            file.rename(others / file.name)
    split(source, tmp_path / "cut", 4, stages=2)
    retrained = shard_of(tmp_path / "cut", 2, 1, 0)
    torch.save({key: tensor + 0.5 for key, tensor in retrained.items()}, others / S(1, 0))
    shutil.rmtree(tmp_path / "again")
    return tmp_path / "cut"


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(cut, case):
    change, texts = WRONG[case]
    change(cut)
    said = "\n".join(
        problem for report in reports_of(cut, None, None) for problem in report.problems
    )
    assert all(text in said for text in texts), said


@pytest.mark.parametrize(
    "script, case",
    (
        ("checkpoint_merge.py", "stages of other degrees"),
        ("checkpoint_merge.py", "of another run"),
        ("checkpoint_split.py", "a layer lost"),
        ("checkpoint_verify.py", "stages swapped"),
        ("solver_generate.py", "a stage is missing"),
    ),
)
def test_scripts_refuse(cut, tmp_path, script, case):
    change, texts = WRONG[case]
    change(cut)
    (tmp_path / "rows.json").write_text('[{"instruction": "1 + 1?"}]')
    before = sorted(tmp_path.rglob("*"))
    given = {
        name: tmp_path / value.format("cut") if isinstance(value, str) else value
        for name, value in SCRIPTS[script].items()
    }
    done = start(1, script, *flags(**given))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(text in done.stderr for text in texts), done.stderr
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(
    "cut, text",
    (
        (dict(n=8, stages=3), "--n 8 --stages 3: every stage has as many shards"),
        (dict(n=6, stages=6), "--stages 6 makes 6 stages, and the model has 5 layers"),
    ),
)
def test_cuts_that_cannot_be(tmp_path, made, cut, text):
    read = flags(ckpt_file=made("llama")[0], save_path=tmp_path / "out", **cut)
    done = start(1, "checkpoint_split.py", *read)
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_stages_file_is_no_checkpoint(cut):
    with pytest.raises(UserError, match=f"holds one stage's layers alone; give {cut}, with all"):
        Checkpoint.open(str(cut / S(0, 0)))
