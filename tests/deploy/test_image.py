"""The image: its Dockerfile, and what .dockerignore lets into it. None is built here."""

import fnmatch
import re
import subprocess
import tomllib
from pathlib import PurePosixPath

import pytest
import yaml

from tests.launch import ROOT

DOCKERFILE = ROOT / "deploy/Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(name, the rest of it) of each, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n", "\n", "\n".join(lines))
    found = re.findall(r"^([A-Z]+) ((?:.|\n(?=\s))*)", whole, re.MULTILINE)
    return [(name, " ".join(rest.split())) for name, rest in found]


def of(name: str) -> list[str]:
    return [rest for kind, rest in instructions() if kind == name]


def is_sent(path: str) -> bool:
    """Whether Docker gets a file: the last pattern counts that fits it or a folder it lies in."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = PurePosixPath(path).parts
        starts = range(len(parts)) if "**/" in line else [0]
        heads = ["/".join(parts[start:end]) for start in starts for end in range(1, len(parts) + 1)]
        fits = [head for head in heads if head.count("/") == pattern.count("/")]
        if any(fnmatch.fnmatchcase(head, pattern) for head in fits):
            sent = line.startswith("!")
    return sent


def test_it_has_a_python_that_the_project_takes():
    [base] = of("FROM")
    version = tuple(map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim-\w+", base).groups()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = re.fullmatch(r">=(\d+)\.(\d+)", project["requires-python"])
    assert version >= tuple(map(int, needed.groups()))


def test_every_version_is_that_of_the_requirements():
    installs = re.findall(r"pip install ([^&]+)", " ".join(of("RUN")))
    files = [re.search(r"--requirement (\S+)$", install.strip())[1] for install in installs]
    assert files == ["torch.txt", "requirements.txt"], "nothing is installed by its name"
    # The first file is made by a command of its own, which is tried here.
    [run] = [run for run in of("RUN") if "torch.txt" in run]
    select = run.split(" && ")[0].replace(">torch.txt", "")
    done = subprocess.run(["sh", "-c", select], cwd=ROOT, capture_output=True, text=True)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if "torch=" in line]
    assert done.stdout.splitlines() == pins and len(pins) == 1, done


def test_its_commands_are_a_shells():
    for run in of("RUN"):
        done = subprocess.run(["sh", "-n", "-c", run], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_it_runs_as_the_user_that_the_pods_run_as():
    names = [name for name, _ in instructions()]
    assert "USER" not in names[: max(i for i, name in enumerate(names) if name == "RUN")]
    [user] = of("USER")
    job = yaml.safe_load((ROOT / "deploy/pytorchjob.yaml").read_text())
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["securityContext"]
    # A name would not do: Kubernetes can only tell of a number that it is not root.
    assert int(user) == pod["runAsUser"] == pod["fsGroup"] != 0
    assert f"--uid {user} " in " ".join(of("RUN"))


def test_what_is_copied_exists_and_is_sent():
    for copied in of("COPY"):
        *sources, _ = copied.split()
        for source in sources:
            assert (ROOT / source).exists()
            assert source == "." or is_sent(source)


def test_the_image_holds_what_runs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    scripts = [f"{module}.py" for module in project["tool"]["setuptools"]["py-modules"]]
    listed = [
        str(path.relative_to(ROOT))
        for folder in ("src", "dataset", "recipes", "deploy")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(listed) > 100
    left_out = [path for path in ["requirements.txt", *scripts, *listed] if not is_sent(path)]
    assert left_out == []


@pytest.mark.parametrize(
    "path",
    [
        *("sft/consolidated.00.pth", "runs/a/step.safetensors", ".venv/bin/python", ".git/config"),
        *(".env", "src/models/__pycache__/llama.cpython-311.pyc", "__pycache__/a.pyc", "data.json"),
        *("tests/launch.py", "wandb/key"),
    ],
)
def test_the_image_holds_nothing_else(path):
    assert not is_sent(path)
