"""Every recipe goes with its script: by its model's sizes, or on a tiny model and real rows."""

import re
import shlex

import pytest

from src.models.hf_config import PRESETS
from src.settings.config_file import read_config
from src.settings.declaration import declared
from tests.launch import ROOT
from tests.settings.test_declaration import SCRIPTS
from tests.test_scripts import call, flags, must

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model and rows such as a laptop's user makes; a verifier made of the solver's weights."""
    folder = tmp_path_factory.mktemp("recipes")
    must("dataset/build.py", "arithmetic", *flags(save_dir=folder / "data", n_train=60, n_test=7))
    rows = flags(train_file=folder / "data" / "train.json", save_dir=folder / "start")
    must("dataset/start.py", *rows, *flags(vocab_size=430, dim=32, n_layers=1, n_heads=4))
    pairs = folder / "data" / "verifier_train.json"
    start = flags(ckpt_dir=folder / "start", train_file=pairs, max_batch_size=60, lr=1e-9)
    must("verifier_train.py", *start, *flags(save_dir=folder / "verifier"))
    return folder


def usage(recipe) -> list[str]:
    """The command in the head of a recipe, as words."""
    head = recipe.read_text().split("\n\n")[0]
    lines = [line.removeprefix("#").strip() for line in head.splitlines()]
    # Of several commands the last is the recipe's.
    start = max(i for i, line in enumerate(lines) if line.startswith("torchrun"))
    command = ""
    for line in lines[start:]:
        command += line.removesuffix("\\")
        if not line.endswith("\\"):
            break
    return shlex.split(command)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_goes_with_its_script(recipe, tiny):
    words = usage(recipe)
    ranks, script = int(words[2]), words[3]
    assert words[:2] == ["torchrun", "--nproc_per_node"] and words[4] == "--config"
    assert words[5] == f"recipes/{recipe.name}"
    # What it says to give beside the file is all that the script still needs.
    settings = declared(SCRIPTS[script])
    values, _, problems = read_config(str(recipe), settings)
    named = {word.removeprefix("--") for word in words[6:] if word.startswith("--")}
    required = {name for name, setting in settings.items() if setting.is_required}
    assert problems == [] and required <= named and not named & values.keys()
    assert all(line.startswith("#") for line in recipe.read_text().split("\n\n")[0].splitlines())

    plan = ["--config", str(recipe), "--dry_run", "--world_size", str(ranks)]
    if values.get("model_type") is not None:
        assert values["model_type"] in PRESETS
        out = must(script, *plan).out
    else:
        data = tiny / "data"
        of_pairs = script in ("verifier_train.py", "preference_train.py")
        rows = data / ("verifier_train.json" if of_pairs else "train.json")
        files = {
            "ckpt_dir": tiny / "start",
            "actor_ckpt_dir": tiny / "start",
            "critic_ckpt_dir": tiny / "verifier",
            "reward_model_ckpt_dir": tiny / "verifier",
            "teacher_ckpt_dir": tiny / "start",
            "train_file": rows,
        }
        writes = {name: tiny / f"out-{name}" for name in named if name.endswith("save_dir")}
        given = {name: path for name, path in (files | writes).items() if name in named}
        out = must(script, *plan, *flags(**given)).out
        assert "example, " in out and ("steps: " in out or "iterations: " in out)
        assert not any(path.exists() for path in writes.values())
    size = values.get("model_parallel_size", ranks)
    assert f"ranks: {size} model-parallel × {ranks // size} data-parallel" in out
    total = int(re.findall(r"([\d,]+)\n  activations", out)[0].replace(",", ""))
    assert 0 < total < 60e9, "80 GB hold it with activations beside"


def test_a_recipe_that_is_edited_wrongly_is_refused_by_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model_type: llama-2-7b\nlora_rnk: 8\n")
    done = call("solver_train.py", "--config", str(path), "--dry_run")
    message = f"{path}:2: lora_rnk: unknown setting; did you mean lora_rank?"
    assert done.code == 2 and message in done.err
