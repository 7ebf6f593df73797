"""A run that was cut off goes on.

What is there is not generated again, and the result is the undisturbed run's.
"""

import json

import pytest

from src.errors import UserError
from src.generation.engine import Completion
from src.generation.journal import Journal
from src.settings.declaration import build
from src.settings.scripts import SolverGenerateSettings
from tests.test_scripts import call, flags, must, refused, rows_of


@pytest.fixture
def journal(tmp_path, parallel):
    def make(**flags) -> Journal:
        files = {"ckpt_dir": "-", "input_file": "-", "output_file": "-"}
        flags = {**files, "temperature": 1.0, "max_batch_size": 4, **flags}
        settings = build(SolverGenerateSettings, flags)
        return Journal(tmp_path / "out.jsonl", settings, parallel)

    return make


def write(journal, *requests: int) -> None:
    journal.open()
    for i in requests:
        journal.add(i, Completion([i, 2], [-0.5, -0.25], "stop"))
    journal.close()


def test_what_was_added_is_read_by_the_next(journal):
    assert journal().known == {}
    write(journal(), 3, 1)
    write(journal(max_batch_size=9), 5)  # a flag that changes no completion
    assert journal().known == {i: Completion([i, 2], [-0.5, -0.25], "stop") for i in (3, 1, 5)}
    journal().remove()
    assert journal().known == {}


def test_a_line_that_was_cut_short_is_generated_again(journal, tmp_path):
    write(journal(), 0, 1)
    path = tmp_path / "out.jsonl.partial-0"
    path.write_bytes(path.read_bytes()[:-9])
    assert set(journal().known) == {0}
    write(journal(), 7)
    assert set(journal().known) == {0, 7}


def test_other_settings_are_refused_by_name(journal):
    write(journal(), 0)
    text = r"--temperature 1.0 → 0.5.*give the same to go on, or remove it"
    with pytest.raises(UserError, match=text):
        journal(temperature=0.5)


def test_a_file_of_something_else_is_refused(journal, tmp_path):
    (tmp_path / "out.jsonl.partial-0").write_text("thesis\n")
    with pytest.raises(UserError, match="out.jsonl.partial-0: cannot be read"):
        journal()


def test_interrupted_generation_goes_on(tmp_path, monkeypatch):
    """Cut off in the middle, then run again: only the rest is generated.

    The file is the undisturbed run's.
    """
    from src.generation.engine import Engine

    must("dataset/build.py", "arithmetic", *flags(save_dir=tmp_path / "data", n_train=12, n_test=2))
    must(
        "dataset/start.py",
        *flags(
            train_file=tmp_path / "data" / "train.json",
            save_dir=tmp_path / "start",
            vocab_size=424,
            dim=32,
            n_layers=1,
            n_heads=4,
        ),
    )
    command = dict(
        ckpt_dir=tmp_path / "start",
        input_file=tmp_path / "data" / "train.json",
        num_samples=2,
        temperature=1.0,
        max_new_tokens=6,
        max_batch_size=5,
    )
    must("solver_generate.py", *flags(**command, output_file=tmp_path / "whole.jsonl"))
    whole, generate = Engine.generate, Engine.generate

    def cut_off(self, *args, on_completion=None, **kwargs):
        seen = []

        def count(i, completion):
            args[5](i, completion)
            seen.append(i)
            if len(seen) == 9:
                raise KeyboardInterrupt

        return generate(self, *args[:5], count)

    monkeypatch.setattr(Engine, "generate", cut_off)
    out = tmp_path / "out.jsonl"
    assert call("solver_generate.py", *flags(**command, output_file=out)).code == 130
    assert not out.exists() and len(rows_of_partial(tmp_path)) == 1 + 9
    asked = []

    def recording(self, prompts, *args):
        asked.extend(prompts)
        return whole(self, prompts, *args)

    monkeypatch.setattr(Engine, "generate", recording)
    other = flags(**(command | {"temperature": 0.5}), output_file=out)
    refused(call("solver_generate.py", *other), "--temperature 1.0 → 0.5")
    must("solver_generate.py", *flags(**(command | {"max_batch_size": 3}), output_file=out))
    assert len(asked) == 24 - 9
    a, b = rows_of(out), rows_of(tmp_path / "whole.jsonl")
    assert [row["tokens"] for row in a] == [row["tokens"] for row in b]
    assert not list(tmp_path.glob("*.partial-*"))


def rows_of_partial(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "out.jsonl.partial-0").read_text().splitlines()]
