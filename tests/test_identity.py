"""Which command is the same run again."""

import shutil

import pytest

from src.checkpoint.manifest import described, write_manifest
from src.identity import differences, held, held_rows, identity
from src.settings.declaration import (
    CONTENT,
    FIXED,
    MAY_CHANGE,
    build,
    declared,
    defaults,
    find_problems,
)
from src.settings.distillation import DistillTrainSettings
from src.settings.ppo import PPOTrainSettings
from src.settings.preference import PreferenceTrainSettings
from src.settings.scripts import (
    SolverEvaluateSettings,
    SolverGenerateSettings,
    SolverTrainSettings,
    VerifierTrainSettings,
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x.safetensors").write_text("1")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_is_what_belongs_to_a_checkpoint(folder):
    before = held(str(folder))
    (folder / "out.jsonl.partial-0").write_text("what a run writes")
    (folder / "runs").mkdir()
    assert held(str(folder)) == before
    for name in ("x.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text("another")
        assert held(str(folder)) != before, name
        before = held(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.model.v3", "x.tiktoken", "tekken_240911.json"])
def test_a_tokenizer_by_another_name_belongs_to_a_folder_too(folder, name):
    (folder / name).write_text("one")
    before = held(str(folder))
    (folder / name).write_text("two")
    assert held(str(folder)) != before


def test_a_folder_with_a_manifest_may_be_copied(folder, tmp_path):
    write_manifest(folder, {"x.safetensors": described(folder / "x.safetensors")})
    shutil.copytree(folder, tmp_path / "b", copy_function=shutil.copyfile)  # other times of change
    assert held(str(tmp_path / "b")) == held(str(folder))
    (folder / "x.safetensors").write_text("2")
    write_manifest(folder, {"x.safetensors": described(folder / "x.safetensors")})
    assert held(str(tmp_path / "b")) != held(str(folder))


def test_what_describes_a_tokenizer_belongs_to_it_and_a_missing_path_is_its_name(folder, tmp_path):
    for name in ("tokenizer.json", "x.json"):
        (folder / name).write_text("{}")
    before, other = held(str(folder / "tokenizer.json")), held(str(folder / "x.json"))
    (folder / "chat_template.jinja").write_text("another")
    assert held(str(folder / "tokenizer.json")) != before and held(str(folder / "x.json")) == other
    assert held("nowhere") != held("elsewhere")
    (folder / "gone.bin").symlink_to(tmp_path / "nowhere")
    before = held(str(folder))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    assert held(str(folder)) != before


def test_a_function_of_a_file_is_both(tmp_path):
    for name, text in (("a.py", "1"), ("b.py", "2"), ("c.py", "1")):
        (tmp_path / name).write_text(text)

    def of(text):
        return held(str(tmp_path / text))

    assert (
        of("a.py:f") == of("c.py:f")
        and len({of("a.py:f"), of("a.py:g"), of("b.py:f"), of("a.py")}) == 4
    )


def test_a_file_is_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("a.json", "1"), ("b.json", "1"), ("c.json", "2")):
        (tmp_path / name).write_text(text)

    def of(path, **more):
        flags = {"ckpt_dir": "-", "save_dir": "-", "train_file": path, "lr": 0.1, **more}
        return identity(build(SolverTrainSettings, {"log_dir": path, **flags}))

    def changes(now, before):
        return [str(c) for c in differences(before, now, defaults(SolverTrainSettings))]

    task = {"task": "GSM8K", "label_file": "c.json"}
    before = of("a.json")
    assert "log_dir" not in before
    for same in ("a.json", "./a.json", "b.json"):
        assert changes(of(same), before) == []
    assert changes(of("c.json"), before) == ["--train_file a.json → c.json"]
    assert changes(of("a.json", lr=0.2), before) == ["--lr 0.1 → 0.2"]
    assert changes(of("a.json", **task), before) == [
        "--label_file None → c.json",
        "--task None → GSM8K",
    ]
    (tmp_path / "a.json").write_text("3")
    assert changes(of("a.json"), before) == ["--train_file a.json holds something else now"]
    assert [str(c) for c in differences(None, {"lr": 1}, {})] == ["--lr None → 1"]


def test_a_setting_that_an_older_record_does_not_know_had_its_default():
    flags = {"ckpt_dir": "-", "save_dir": "-", "train_file": "-"}
    now = identity(build(SolverTrainSettings, flags))
    older = {name: value for name, value in now.items() if name not in ("beta2", "train_file")}
    known = defaults(SolverTrainSettings)
    assert [c.name for c in differences(older, now, known)] == ["train_file"]
    assert [str(c) for c in differences(older, now | {"beta2": 0.9}, known)] == [
        "--beta2 0.999 → 0.9",
        "--train_file None → -",
    ]


# What may be another when a run goes on: where, how fast and how visibly it trains.
FREE = {
    *("save_dir", "actor_save_dir", "critic_save_dir", "log_dir", "dump_rollouts", "log_samples"),
    *("profile", "save_every", "keep", "resume", "resume_changed", "timeout", "zero", "offload"),
    *("update", "context_parallel_size", "max_minutes", "save_copies", "straggler_window"),
    *("kv_cache_gb", "checkpoint_activations", "compile", "model_parallel_size"),
    *("actor_train", "actor_gen", "critic_train", "critic_inf", "ref_inf", "rew_inf"),
    *("rollout_batch_size", "eval_batch_size", "max_batch_size", "accumulation_steps"),
    *("max_tokens_per_batch", "output_file", "dry_run", "world_size"),
    *("offload_params", "offload_optimizer", "cpu_adam", "sequence_parallel"),
    *("pipeline_parallel_size", "stages_per_rank"),
    *(
        "map_workers",
        "cache_reference",
        "teacher_model_parallel_size",
        "offload_teacher",
        "best_of",
    ),
}
# What a saved step holds depends on them: they can never be others.
FIXED_NAMES = {"lora_rank", "lora_targets", "freeze_layers", "shared_trunk", "ref_ema", "optimizer"}
SCRIPTS = (
    SolverTrainSettings,
    VerifierTrainSettings,
    PPOTrainSettings,
    PreferenceTrainSettings,
    DistillTrainSettings,
    SolverGenerateSettings,
    SolverEvaluateSettings,
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_may_change_and_whose_content_counts(script):
    for name, setting in declared(script).items():
        assert (MAY_CHANGE in setting.marks) == (name in FREE), name
        is_path = (name.endswith(("_dir", "_file")) or name == "map") and name not in FREE
        assert (CONTENT in setting.marks) == is_path, name
        assert (FIXED in setting.marks) == (name in FIXED_NAMES), name


@pytest.mark.parametrize("script", SCRIPTS[:5])
def test_the_names_of_what_may_be_changed_are_settings_that_can_be(script):
    required = [name for name, setting in declared(script).items() if setting.is_required]

    def said(**given) -> list[str]:
        problems = find_problems(script, dict.fromkeys(required, "-") | given)
        return [problem for problem in problems if "resume_changed" in problem]

    assert said(resume_changed=["lr", "seed", "train_file", "keep"]) == []
    (unknown,) = said(resume_changed=["lr", "warmupp"])
    assert unknown == ("--resume_changed warmupp: there is no such setting; did you mean warmup?")
    (fixed,) = said(resume_changed=["lora_rank"])
    assert fixed.startswith("--resume_changed lora_rank: it decides what a saved step holds")
    (idle,) = said(resume_changed=["lr"], resume="none")
    assert idle == "--resume_changed lr: has no effect with --resume none, which begins anew"


def test_rows_are_what_their_files_hold_and_how_they_are_mixed(tmp_path):
    for name, text in (("a.jsonl", "1"), ("b.jsonl", "2"), ("notes.md", "3")):
        (tmp_path / name).write_text(text)
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    shutil.copytree(tmp_path, tmp_path / "copy")
    folder, copy = held_rows(str(tmp_path)), held_rows(str(tmp_path / "copy"))
    assert held_rows(str(a)) == held(str(a)), "as a run of an earlier version has it"
    assert folder == copy == held_rows(f"{a},{b}") == held_rows(f"{tmp_path}/*.jsonl")
    assert folder != held_rows(f"{b},{a}")
    weighted = {held_rows(f"{a}:{w},{b}:1") for w in ("0.5", "0.25", "1")}
    assert len(weighted) == 3 and folder not in weighted
    (tmp_path / "notes.md").write_text("another")
    assert held_rows(str(tmp_path)) == folder
    b.write_text("another")
    assert held_rows(str(tmp_path)) != folder
    assert held_rows("missing.jsonl") == "missing.jsonl"
