"""Settings from and to YAML: what a file means, what is refused with its line, and the way back."""

import json
import string

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as how_often
from hypothesis import strategies as st

from src.errors import UserError
from src.settings.config_file import read_config, to_yaml
from src.settings.declaration import build, declared, flat
from src.settings.ppo import PPOTrainSettings
from src.settings.scripts import SolverGenerateSettings, SolverTrainSettings
from tests.test_cli import call

SOLVER = declared(SolverTrainSettings)


def read(tmp_path, text: str):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    values, _, problems = read_config(str(path), SOLVER)
    return values, [problem.removeprefix(f"{path}:") for problem in problems]


@pytest.mark.parametrize(
    "line, value",
    [
        ("lr: 1e-5", 1e-5),  # which YAML 1.1 takes for a string
        ("lr: 1", 1.0),
        ("epochs: 3", 3),
        ("epochs: 1_000", 1000),
        ("lora_rank: -1", -1),
        ("use_chat_template: true", True),
        ("use_chat_template: No", False),
        ("lora_targets: [wq, wv]", ["wq", "wv"]),
        ("lora_targets:\n  - wq\n  - wv", ["wq", "wv"]),
        ("lora_targets: wq,wv", ["wq", "wv"]),
        ("lora_targets: null", None),
        ("lora_alpha: ~", None),
        ("lora_alpha:", None),
        ("lora_alpha: None", None),
        ("dtype: bf16", "bf16"),
        ("zero: 0", 0),
        ("model_type: 2024_01", "2024_01"),
        ("train_file: 'a: b'", "a: b"),
        ("train_file: 0123", "0123"),
        ("train_file: null.json", "null.json"),
    ],
)
def test_a_value_means_what_it_means_as_a_flag(tmp_path, line, value):
    name = line.partition(":")[0]
    values, problems = read(tmp_path, f"# a comment\n{line}\n")
    assert (values, problems) == ({name: value}, []) and type(values[name]) is type(value)


@pytest.mark.parametrize(
    "text, problems",
    [
        ("lrr: 1", ["1: lrr: unknown setting; did you mean lr?"]),
        ("seed: 1\n\nlora-rank: 2", ["3: lora-rank: unknown setting; did you mean lora_rank?"]),
        ("advantage: grpo", ["1: advantage: unknown setting"]),  # another script's
        ("lr: fast", ["1: lr: must be a number, got 'fast'"]),
        ("lr: .inf", ["1: lr: must be a number, got '.inf'"]),
        ("epochs: 1.5", ["1: epochs: must be an integer, got '1.5'"]),
        ("epochs: [1]", ["1: epochs: must be int, got a list"]),
        ("epochs: null", ["1: epochs: must be int, got null"]),
        ("train_file:", ["1: train_file: must be str, got null"]),
        ("epochs: {a: 1}", ["1: epochs: must be int, got a group: keys stand side by side"]),
        ("lora_targets: []", ["1: lora_targets: is an empty list; write null"]),
        ("lora_targets: [[wq]]", ["1: lora_targets: must be a list of str, got a list of more"]),
        ("lora_targets: [wq, null]", ["1: lora_targets: must be a list of str, got 'null' in it"]),
        ("lora_targets: [!x wq]", ["1: lora_targets: must be a list of str, got 'wq' in it"]),
        ('train_file: "a\\0b"', ["1: train_file: holds a NUL character"]),
        ("schedule: cosin", ["1: schedule: must be one of cosine, linear, constant; got 'cosin'"]),
        ("lr: 1\nlr: 2", ["2: lr: given twice"]),
        ("lr: !!python/object/apply:os.system [ls]", ["1: lr: must be float, got a list"]),
        ("model_type: !mine x", ["1: model_type: the tag !mine is not taken"]),
        ("[a, b]: 1", ["1: "]),
        ("1: 2", ["1: 1: unknown setting"]),
        ("lr: a\nepochs: b\nx: 1", ["1: lr", "2: epochs", "3: x"]),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, problems):
    values, found = read(tmp_path, text)
    assert len(found) == len(problems)
    assert all(line.startswith(start) for line, start in zip(found, problems)), found


@pytest.mark.parametrize(
    "content, message",
    [
        (b"lr: [1", "a.yaml:1: is not YAML"),
        (b"a\n\tb: c", "is not YAML"),
        (b"lr: 1\n---\nlr: 2", "is not YAML"),
        (b"lr: &a [*b]", "is not YAML"),
        (b"- lr\n- 1", "holds no settings; write NAME: VALUE in each line"),
        (b"lr", "holds no settings"),
        (b"lr: \xff", "is not UTF-8 text"),
        (b"[" * 5000, "is not YAML"),
        (b"#" * (2**20 + 1), "is larger than 1,048,576 bytes"),
        (b"lr: \x00", "is not YAML"),
    ],
)
def test_what_is_no_file_of_settings_is_refused(tmp_path, content, message):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError) as refusal:
        read_config(str(tmp_path / "a.yaml"), SOLVER)
    assert str(refusal.value).startswith("--config ") and message in str(refusal.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(UserError, match="--config .*: cannot be read"):
            read_config(str(path), SOLVER)


def test_an_empty_file_sets_nothing(tmp_path):
    assert read(tmp_path, "") == ({}, []) == read(tmp_path, "# nothing\n")


def main(settings: SolverTrainSettings) -> None:
    print(json.dumps(flat(settings)))


def test_flags_win_over_the_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.yaml").write_text(
        "ckpt_dir: A\nsave_dir: B\ntrain_file: C\nlr: 0.5\nepochs: 7\nlora_rank: 4\n"
        "lora_targets: [wq, wv]\nuse_chat_template: true\n"
    )
    words = ["--config", str(tmp_path / "a.yaml"), "--lr", "1e-3", "--save_dir=D"]
    words += ["--lora_targets", "None", "--nouse_chat_template"]
    code, out, err = call(main, words, monkeypatch, capsys)
    assert (code, err) == (None, "")
    values = json.loads(out)
    assert (values["lr"], values["epochs"], values["save_dir"]) == (1e-3, 7, "D")
    assert values["lora_targets"] is None and values["use_chat_template"] is False


def test_problems_of_file_and_flags_come_in_one_message(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("ckpt_dir: A\nlrr: 1\nepochs: 0\n")
    code, out, err = call(main, ["--config", str(path), "--warmup", "2"], monkeypatch, capsys)
    assert (code, out) == (2, "") and err.startswith("error: 5 problems")
    for message in (
        f"{path}:2: lrr: unknown setting",
        f"{path}:3: epochs 0: must be at least 1",
        "--warmup 2.0: must be at least 0",
        "--save_dir: required",
        "--train_file: required",
    ):
        assert message in err


TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=("Cs",)), min_size=1
)


@how_often(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {"ckpt_dir": TEXTS, "input_file": TEXTS, "output_file": TEXTS},
        optional={
            "stop_strings": st.lists(TEXTS, min_size=1, max_size=3),
            "top_p": st.floats(0, 1, exclude_min=True),
            "seed": st.integers(0, 2**63 - 1),
            "timeout": st.floats(1e-300, 1e7),
            "use_chat_template": st.booleans(),
            "model_type": st.text(string.ascii_letters + "0123456789.~_-", min_size=1),
        },
    )
)
def test_what_is_written_is_read_again_as_the_same_settings(tmp_path_factory, values):
    if values.get("model_type") in ("None", "none"):  # as a flag's text, they stand for null
        return
    path = tmp_path_factory.getbasetemp() / "settings.yaml"
    settings = build(SolverGenerateSettings, values)
    path.write_text(to_yaml(settings, "head"), encoding="utf-8", newline="")
    again, _, problems = read_config(str(path), declared(SolverGenerateSettings))
    assert problems == [] and build(SolverGenerateSettings, again) == settings


def test_all_of_a_script_s_settings_are_written_with_their_defaults_and_no_others():
    needed = {"actor_ckpt_dir": "A", "actor_save_dir": "B", "train_file": "C"}
    flags = {**needed, "advantage": "reinforce++", "reward": ["rule"]}
    text = to_yaml(build(PPOTrainSettings, flags), "ppo_train.py --config X")
    names = [line.partition(":")[0] for line in text.splitlines() if line and line[0] not in "# "]
    assert sorted(names) == sorted(declared(PPOTrainSettings))
    assert text.startswith("# ppo_train.py --config X\n") and "\nreward: [rule]\n" in text
    assert "# The KL penalty and its reference\n" in text
