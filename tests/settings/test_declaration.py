"""Settings as they are declared: every script's, their bounds, their rules, and what is derived."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from src.errors import UserError
from src.settings import distillation, plan, ppo, preference, pretraining, scripts
from src.settings.declaration import (
    CONTENT,
    MAY_CHANGE,
    Above,
    AtLeast,
    Between,
    Bounds,
    Choices,
    Settings,
    Unit,
    build,
    by_group,
    declared,
    flat,
    of_function,
)
from tests.launch import ROOT

SCRIPTS = {
    "solver_train.py": scripts.SolverTrainSettings,
    "verifier_train.py": scripts.VerifierTrainSettings,
    "pretrain.py": pretraining.PretrainSettings,
    "preference_train.py": preference.PreferenceTrainSettings,
    "distill_train.py": distillation.DistillTrainSettings,
    "ppo_train.py": ppo.PPOTrainSettings,
    "solver_generate.py": scripts.SolverGenerateSettings,
    "solver_score.py": scripts.SolverScoreSettings,
    "solver_evaluate.py": scripts.SolverEvaluateSettings,
    "verifier_evaluate.py": scripts.VerifierEvaluateSettings,
    "checkpoint_split.py": scripts.CheckpointSplitSettings,
    "checkpoint_merge.py": scripts.CheckpointMergeSettings,
    "plan.py": plan.PlanSettings,
}


@dataclass(frozen=True, kw_only=True)
class Colour(Settings):
    """What it looks like.

    More on that.
    """

    shade: Annotated[Literal["dark", "light"], "how much light"] = "dark"
    depth: Annotated[float, Between(0, 1), Unit("metres"), "how deep"] = 0.5
    name: Annotated[str, Choices("red", "blue"), MAY_CHANGE] = "red"

    def problems(self) -> Iterator[str]:
        if self.shade == "light" and self.depth > 0.9:
            yield f"--depth {self.depth}: nothing light is that deep"


@dataclass(frozen=True, kw_only=True)
class Place(Settings):
    """Where it is."""

    folder: Annotated[str, CONTENT, "where"]
    level: Annotated[int | None, AtLeast(1)] = None


@dataclass(frozen=True, kw_only=True)
class Thing(Settings):
    """All of it."""

    place: Place
    colour: Colour = Colour(shade="light")

    def problems(self) -> Iterator[str]:
        if self.place.level == 7:
            yield "--level 7: is taken"


# --- what is read off a declaration -------------------------------------------------------------


def test_a_script_is_its_groups_with_its_own_defaults():
    settings = declared(Thing)
    assert list(settings) == ["folder", "level", "shade", "depth", "name"]
    assert settings["shade"].default == "light" and declared(Colour)["shade"].default == "dark"
    assert settings["folder"].is_required and CONTENT in settings["folder"].marks
    depth = settings["depth"]
    assert (depth.help, depth.unit, depth.group) == ("how deep", "metres", "What it looks like")
    assert settings["name"].parse("blue") == "blue" and MAY_CHANGE in settings["name"].marks
    with pytest.raises(ValueError, match="must be one of red, blue; got 'blu'; did you mean blue"):
        settings["name"].parse("blu")
    assert list(by_group(settings)) == ["Where it is", "What it looks like"]


def test_flat_values_and_the_object_are_each_other_s_inverse():
    thing = build(Thing, {"folder": "here", "depth": 0.1})
    assert thing == Thing(place=Place(folder="here"), colour=Colour(shade="light", depth=0.1))
    assert build(Thing, flat(thing)) == thing
    with pytest.raises(dataclasses.FrozenInstanceError):
        thing.place.level = 3


@pytest.mark.parametrize(
    "values, messages",
    [
        ({}, ["--folder: required, but not given"]),
        ({"level": 0}, ["--folder: required", "--level 0: must be at least 1 and at most 1e+07"]),
        ({"folder": "f", "depth": 1.5}, ["--depth 1.5: must be at least 0 and at most 1"]),
        ({"folder": "f", "depth": 0.95, "level": 7}, ["nothing light is that deep", "is taken"]),
        # A rule is looked at beside what is out of bounds, which counts as its default then.
        ({"folder": "f", "depth": 0.95, "level": -1}, ["--level -1", "nothing light is that deep"]),
    ],
)
def test_all_that_is_wrong_is_said_at_once(values, messages):
    with pytest.raises(UserError) as refusal:
        build(Thing, values)
    lines = str(refusal.value).split("\n  ")
    assert len(lines) == len(messages)
    for message in messages:
        assert any(message in line for line in lines), message


def test_labels_name_where_a_value_came_from():
    with pytest.raises(UserError, match="^a.yaml:3: level 0: must be at least 1"):
        build(Thing, {"folder": "f", "level": 0}, {"level": "a.yaml:3: level"})


@pytest.mark.parametrize(
    "bounds, inside, outside",
    [
        (AtLeast(1), (1, 10**7), (0, 10**7 + 1)),
        (Above(0), (1e-9, 1e9), (0, -1, 1e10)),
        (Between(0, 1), (0, 1), (-0.001, 1.001)),
        (Bounds(1, 5, also=(-1,)), (-1, 1, 5), (0, -2, 6)),
    ],
)
def test_bounds(bounds, inside, outside):
    assert all(x in bounds for x in inside) and not any(x in bounds for x in outside)


def test_what_no_command_line_can_hold_is_a_bug():
    @dataclass(frozen=True, kw_only=True)
    class Twice(Settings):
        one: Colour = Colour()
        other: Colour = Colour()

    with pytest.raises(TypeError, match="shade is declared by two groups"):
        declared(Twice)
    with pytest.raises(TypeError, match="Thing has no depht"):
        build(Thing, {"folder": "f", "depht": 1.0})


def test_a_small_tool_declares_its_parameters():
    def tool(file: Annotated[str, "the file"], n: Annotated[int, AtLeast(1), "how many"] = 3): ...

    settings = declared(of_function(tool))
    assert settings["file"].is_required and settings["n"].help == "how many"
    with pytest.raises(UserError, match="--n 0: must be at least 1"):
        build(of_function(tool), {"file": "f", "n": 0})


# --- the scripts' own -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_has_a_sentence_and_a_default_that_it_takes_itself(script):
    for name, setting in declared(SCRIPTS[script]).items():
        assert setting.help and setting.group, name
        if setting.is_required or setting.default is None:
            continue
        assert setting.out_of_bounds(setting.default) is None, name
        text = setting.default
        text = ",".join(map(str, text)) if isinstance(text, tuple | list) else str(text)
        assert setting.parse(text) == setting.default, name
        assert type(setting.parse(text)) is type(setting.default), name
    # Numbers have bounds.
    numbers = [s for s in declared(SCRIPTS[script]).values() if _is_number(s.kind)]
    assert [s.name for s in numbers if s.bounds is None] == []


def _is_number(kind) -> bool:
    return kind in (int, float) or any(k in (int, float) for k in typing.get_args(kind))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_s_main_takes_its_settings_and_is_short(script):
    text = (ROOT / script).read_text()
    assert f"def main(settings: {SCRIPTS[script].__name__}) -> None:" in text
    body = text[text.index("def main(") : text.index("command = partial")]
    assert len(body.rstrip().splitlines()) <= 100
    assert len(re.findall(r"^ +def ", body, re.M)) == 0, "a nested function"


def test_a_setting_s_type_default_and_help_stand_in_one_place():
    """`name: Annotated[` (or an alias of one) once for each class that is not another's base."""
    folder = ROOT / "src" / "settings"
    text = "\n".join(path.read_text() for path in folder.glob("*.py"))
    for name in ("lam", "max_tokens_per_batch", "top_p", "lr", "lora_rank", "seed", "kl_coef"):
        assert len(re.findall(rf"^    {name}: ", text, re.M)) == 1, name
