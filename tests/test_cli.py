"""src/cli.py: a wrong command line never runs anything, and one failure is told once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from src import cli
from tests.launch import ended, environment, places

REPO = Path(__file__).resolve().parent.parent

SCRIPT = '''
import json, os, sys, time
from typing import Annotated, Literal, Optional
from src import cli
from src.errors import UserError

def train(data_file: Annotated[str, "Rows to train on."], lr: float = 1e-5, lora_rank: int = 8,
          flag: bool = True, cache: bool = False, run_name: str = "run",
          dtype: Literal["fp32", "bf16"] = "bf16", degree: Literal[1, 2, 4] = 1,
          limit: int | None = None, seed: Optional[int] = 0, tasks: list[str] = ("gsm8k",),
          ranks: list[int] | None = None, notes: str = "", gains: list[float] | None = None):
    """Train something."""
    print(json.dumps(dict(locals(), ran="train")))
    return {"not": "printed"}

def fail(kind: Literal["user", "bug", "interrupt", "pipe"], only_rank: int | None = None,
         late_rank: int | None = None):
    """Fail in one of three ways."""
    if late_rank is not None:
        import torch.distributed  # a failing rank needs it: its import must not be what is late
    if late_rank == int(os.environ.get("RANK", 0)):
        time.sleep(1.5)  # the fault, not a synchronisation
    if only_rank is None or int(os.environ.get("RANK", 0)) == only_rank:
        raise {"user": UserError("the file\\nis bad"), "bug": ZeroDivisionError("a bug"),
               "interrupt": KeyboardInterrupt(), "pipe": BrokenPipeError("a bug")}[kind]

if __name__ == "__main__":
    cli.BARRIER_TIMEOUT_S = float(os.environ.get("BARRIER_TIMEOUT_S", cli.BARRIER_TIMEOUT_S))
    try:
        cli.run({"train": train, "fail": fail} if os.environ.get("COMMANDS") else train)
    finally:  # the exit code of this rank, which the launcher keeps to itself
        code = getattr(sys.exc_info()[1], "code", None)
        open(f"{__file__}.exit.{os.environ.get('RANK', 0)}", "w").write(str(code))
    print("after")
'''
DEFAULTS = dict(
    data_file="d",
    lr=1e-5,
    lora_rank=8,
    flag=True,
    cache=False,
    run_name="run",
    dtype="bf16",
    degree=1,
    limit=None,
    seed=0,
    tasks=["gsm8k"],
    ranks=None,
    notes="",
    gains=None,
    ran="train",
)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def train(script):
    """The script's function, to run in this process."""
    names = {"__name__": "script"}
    exec(compile(SCRIPT, str(script), "exec"), names)
    return names["train"]


def launch(command, **env):
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**kept, "PYTHONPATH": str(REPO), **env},
    )


def call(target, words, monkeypatch, capsys):
    """Exit code (None.

    Returned), stdout and stderr of `run(target)` with a command line, in this process.
    """
    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py", *words])
    code = None
    try:
        cli.run(target)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


RIGHT = [
    ("", {}),
    ("--run_name=2024_01", {"run_name": "2024_01"}),
    ("--run_name 1e3", {"run_name": "1e3"}),
    ("--run_name=None", {"run_name": "None"}),
    ("--run_name=a=b", {"run_name": "a=b"}),
    ("--run_name=", {"run_name": ""}),
    ("--run_name -", {"run_name": "-"}),
    ("--run_name=--lr", {"run_name": "--lr"}),
    ("--run_name=(1,2)", {"run_name": "(1,2)"}),
    ("--flag=false", {"flag": False}),
    ("--flag No --cache YES", {"flag": False, "cache": True}),
    ("--flag 0 --cache 1", {"flag": False, "cache": True}),
    ("--noflag --cache", {"flag": False, "cache": True}),
    ("--lora_rank -1 --lr -1e-3", {"lora_rank": -1, "lr": -1e-3}),
    ("--lora-rank=1_000 --lr 2", {"lora_rank": 1000, "lr": 2.0}),
    ("--limit 5 --seed None", {"limit": 5, "seed": None}),
    ("--limit=none", {}),
    ("--dtype fp32 --degree=4", {"dtype": "fp32", "degree": 4}),
    ("--tasks=math,gsm8k --ranks 1,-2", {"tasks": ["math", "gsm8k"], "ranks": [1, -2]}),
    ("--gains -1,2e3", {"gains": [-1.0, 2e3]}),
    ("--tasks 12", {"tasks": ["12"]}),
    ("--notes x", {"notes": "x"}),  # begins with "no", and is no negation
]


@pytest.mark.parametrize("line, expected", RIGHT, ids=[line or "defaults" for line, _ in RIGHT])
def test_right_command_line_gives_exactly_these_values(train, line, expected, monkeypatch, capsys):
    code, out, err = call(train, ["--data-file", "d", *line.split()], monkeypatch, capsys)
    assert (code, err) == (None, "")
    got = json.loads(out)  # one line: the returned dict is not printed
    assert got == DEFAULTS | expected and [type(v) for v in got.values()] == [
        type(v) for v in (DEFAULTS | expected).values()
    ]


def test_values_with_spaces_and_newlines_arrive_whole(train, monkeypatch, capsys):
    for value in ("a b", "line\nline", " ", "'quoted'", "ünï"):
        _, out, _ = call(train, ["--data_file", value], monkeypatch, capsys)
        assert json.loads(out)["data_file"] == value


WRONG = [  # command line, then what the message must hold
    ("--data_file d --lrr 1e-6", "--lrr: unknown flag; did you mean --lr?"),
    ("--data_file d --lrr=1e-6", "--lrr: unknown flag; did you mean --lr?"),
    ("--data_file d --xyzzy", "--xyzzy: unknown flag\n"),
    ("--data_file d --nofleg", "--nofleg: unknown flag; did you mean --noflag?"),
    ("--data_file d --nolr", "--nolr: unknown flag"),
    ("--lr 1", "--data_file: required, but not given"),
    ("d --data_file d", "'d': positional"),
    ("--data_file d extra", "'extra': positional"),
    ("--data_file d -l", "'-l': positional"),
    ("--data_file d --noflag true", "'true': positional"),
    ("--data_file d --", "'--': positional"),
    ("--data_file d --trace", "--trace: unknown flag"),
    ("--data_file d --lr 1 --lr 2", "--lr: given twice"),
    ("--data_file d --lora_rank 1 --lora-rank=1", "--lora_rank: given twice"),
    ("--data_file d --flag --noflag", "--flag: given twice"),
    ("--data_file d --noflag=true", "--noflag: takes no value, write --flag=false"),
    ("--data_file d --lr", "--lr: no value given"),
    ("--data_file --lr 1", "--data_file: no value given"),
    ("--data_file d --flag maybe", "--flag: must be true or false (or 1, 0, yes, no), got 'maybe'"),
    ("--data_file d --flag=", "--flag: must be true or false (or 1, 0, yes, no), got ''"),
    ("--data_file d --lora_rank 1e3", "--lora_rank: must be an integer, got '1e3'"),
    ("--data_file d --lora_rank 1.0", "--lora_rank: must be an integer, got '1.0'"),
    ("--data_file d --lora_rank=None", "--lora_rank: must be an integer, got 'None'"),
    ("--data_file d --lora_rank 1__0", "--lora_rank: must be an integer, got '1__0'"),
    ("--data_file d --limit five", "--limit: must be an integer, got 'five'"),
    ("--data_file d --lr fast", "--lr: must be a number, got 'fast'"),
    ("--data_file d --lr nan", "--lr: must be finite, got 'nan'"),
    ("--data_file d --lr=-inf", "--lr: must be finite, got '-inf'"),
    ("--data_file d --lr 1e999", "--lr: must be finite, got '1e999'"),
    (
        "--data_file d --dtype bf17",
        "--dtype: must be one of fp32, bf16; got 'bf17'; did you mean bf16?",
    ),
    ("--data_file d --degree 3", "--degree: must be one of 1, 2, 4; got '3'"),
    (
        "--data_file d --tasks a,,b",
        "--tasks: must be a comma separated list without empty items, got 'a,,b'",
    ),
    ("--data_file d --ranks 1,x", "--ranks: must be an integer, got 'x'"),
    ("--data_file d --gains 1,nan", "--gains: must be finite, got 'nan'"),
]


@pytest.mark.parametrize("line, message", WRONG, ids=[line for line, _ in WRONG])
def test_wrong_command_line_runs_nothing(train, line, message, monkeypatch, capsys):
    code, out, err = call(train, line.split(), monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.endswith(
        "(`script.py --help` lists the flags)\n"
    )
    assert err.count("\n") == 2, "one problem, told once"


def test_all_problems_come_in_one_message(train, monkeypatch, capsys):
    line = "--lrr 1e-6 --lora_rank x --dtype=fp33 extra --cache --cache"
    code, out, err = call(train, line.split(), monkeypatch, capsys)
    assert (code, out, err.count("error:")) == (2, "", 1)
    assert [said.split(":")[0].strip() for said in err.splitlines()[1:-1]] == [
        "--lrr",
        "'extra'",
        "--cache",
        "--lora_rank",
        "--dtype",
        "--data_file",
    ]
    assert err.startswith("error: 6 problems")


COMMANDS = [
    ([], "the first argument must be one of train, fail; got nothing"),
    (["trian"], "the first argument must be one of train, fail; got trian; did you mean train?"),
    (["--data_file", "d"], "the first argument must be one of train, fail; got --data_file"),
    (["train", "fail", "--data_file=d"], "'fail': positional"),
    (["train", "--kind=user"], "2 problems"),
]


@pytest.mark.parametrize("words, message", COMMANDS)
def test_wrong_subcommands(train, words, message, monkeypatch, capsys):
    code, out, err = call({"train": train, "fail": print}, words, monkeypatch, capsys)
    assert (
        (code, out) == (2, "")
        and err.startswith(f"error: {message}")
        and "script.py" in err.splitlines()[-1]
    )


def test_a_signature_that_cannot_be_a_command_line_is_a_bug(monkeypatch, capsys):
    def unannotated(x=1): ...
    def positional(*files: str): ...
    def odd(x: dict = None): ...
    def two(x: int | str = 1): ...
    def nested(x: list[Literal["a"]] = None): ...

    for function in (unannotated, positional, odd, two, nested):
        with pytest.raises(TypeError):
            call(function, [], monkeypatch, capsys)


@pytest.mark.parametrize(
    "words, shown",
    [
        (
            ["--help"],
            [
                "--data_file  str (required)",
                "--dtype  fp32 | bf16 (default bf16)",
                "Rows to train on.",
                "--lr  float (default 1e-05)",
                "--config FILE.yaml",
            ],
        ),
        (["--lrr", "1", "-h"], ["Train something."]),
    ],
)
def test_help_is_on_stdout_and_runs_nothing(train, words, shown, monkeypatch, capsys):
    code, out, err = call(train, words, monkeypatch, capsys)
    assert (code, err) == (0, "") and all(text in out for text in shown)
    assert '"ran"' not in out and not re.search(r"-\w, --", out) and "FIRE" not in out


def test_help_of_subcommands(script):
    ran = launch([script, "--help"], COMMANDS="1")
    assert (
        (ran.returncode, ran.stderr) == (0, "")
        and "Train something." in ran.stdout
        and "fail" in ran.stdout
    )
    ran = launch([script, "fail", "--help"], COMMANDS="1")
    assert (ran.returncode, ran.stderr) == (0, "") and "user | bug | interrupt | pipe" in ran.stdout


def test_a_process_runs_checks_and_exits(script):
    ran = launch([script, "--data_file", "d", "--run_name=2024_01", "--flag=false"])
    assert ran.returncode == 0 and ran.stdout.splitlines()[1:] == ["after"]
    assert json.loads(ran.stdout.splitlines()[0]) == DEFAULTS | {
        "run_name": "2024_01",
        "flag": False,
    }
    ran = launch([script, "--lrr=1"])
    assert (ran.returncode, ran.stdout, ran.stderr.count("error:")) == (2, "", 1)
    assert "torch" not in launch(["-X", "importtime", script, "--lrr=1"]).stderr, (
        "torch takes seconds to import"
    )


def test_the_three_ways_to_fail(script):
    ran = launch([script, "fail", "--kind=user"], COMMANDS="1")
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", "error: the file\nis bad\n")
    ran = launch([script, "fail", "--kind=interrupt"], COMMANDS="1")
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "interrupted\n")
    ran = launch([script, "fail", "--kind=bug"], COMMANDS="1")
    assert (
        ran.returncode == 1
        and "Traceback" in ran.stderr
        and "ZeroDivisionError: a bug" in ran.stderr
    )


@pytest.mark.parametrize(
    "words, closed, code",
    [
        (["train", "--data_file", "d"], "stdout", 141),
        (["--help"], "stdout", 141),
        (["train", "--lrr=1"], "stderr", 2),
    ],
)
def test_a_pipe_that_nobody_reads_ends_it_quietly(script, words, closed, code):
    reader, writer = os.pipe()
    os.close(reader)
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: writer}
    env = {**os.environ, "PYTHONPATH": str(REPO), "COMMANDS": "1"}
    ran = subprocess.run([sys.executable, script, *words], env=env, text=True, **outputs)
    os.close(writer)
    assert (ran.returncode, ran.stdout or "", ran.stderr or "") == (code, "", "")


def test_another_broken_pipe_is_a_bug(script):
    ran = launch([script, "fail", "--kind=pipe"], COMMANDS="1")
    assert ran.returncode == 1 and "BrokenPipeError: a bug" in ran.stderr


def torchrun(script, *words, **env):
    """Run at 2 ranks.

    (stdout and stderr, exit code of each rank, "" where the launcher ended it first).
    """
    for rank in (0, 1):
        Path(f"{script}.exit.{rank}").unlink(missing_ok=True)
    command = ["torchrun", "--standalone", "--nproc_per_node=2", str(script), *words]
    with places(2):
        ran = ended(command, environment() | {"COMMANDS": "1"} | env, timeout=60)
    exits = [Path(f"{script}.exit.{rank}") for rank in (0, 1)]
    return ran.stdout + ran.stderr, [path.read_text() if path.exists() else "" for path in exits]


def test_when_all_ranks_fail_rank_zero_speaks_once(script):
    said, exits = torchrun(script, "train", "--lrr=1")
    assert (
        said.count("error:") == 1 and "error: 2 problems" in said and "--lrr: unknown flag" in said
    )
    assert "UserError" not in said, "a traceback"
    assert exits == ["2", "2"]


@pytest.mark.parametrize("late_rank, shared_store", [(0, True), (1, True), (1, False)])
def test_nobody_leaves_before_rank_zero_has_spoken(script, late_rank, shared_store):
    said, exits = torchrun(
        script,
        "fail",
        "--kind=user",
        f"--late_rank={late_rank}",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE=str(int(not shared_store)),
    )
    assert said.count("error:") == 1 and "error: the file\nis bad" in said and exits == ["2", "2"]


def test_when_one_rank_fails_alone_it_names_itself(script):
    said, exits = torchrun(script, "fail", "--kind=user", "--only_rank=1", BARRIER_TIMEOUT_S="1")
    assert said.count("error:") == 1 and "error: rank 1: the file\nis bad" in said
    assert exits == ["None", "2"]


@pytest.mark.parametrize("name", sorted(cli.ALLOCATOR_SETTINGS))
def test_a_gpu_s_memory_grows_in_segments_unless_the_user_has_it_otherwise(
    train, monkeypatch, capsys, name
):
    for other in cli.ALLOCATOR_SETTINGS:
        monkeypatch.setenv(other, "")  # so that what is set here is taken back
        monkeypatch.delenv(other)
    call(train, ["--data-file", "d"], monkeypatch, capsys)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv(name, "max_split_size_mb:128")
    call(train, ["--data-file", "d"], monkeypatch, capsys)
    found = {other: os.environ.get(other) for other in cli.ALLOCATOR_SETTINGS}
    assert found == dict.fromkeys(cli.ALLOCATOR_SETTINGS) | {name: "max_split_size_mb:128"}
