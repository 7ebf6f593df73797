"""docs/tour.md: its code prints what stands below it, and its links lead somewhere."""

import difflib
import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from src.parallel.setup import stop

TOUR = Path(__file__).resolve().parents[1] / "docs" / "tour.md"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"-?\d+\.\d+")
# Other kernels round otherwise: at the end of the tour that was up to 0.003, seen with the vector
# instructions of older machines (ATEN_CPU_CAPABILITY=default).
TOLERANCE = 0.01


@dataclass(frozen=True)
class Step:
    """A block of code, the line that it begins on, and what it is said to print."""

    line: int
    code: str
    printed: str = ""


def steps_of(text: str) -> list[Step]:
    """The document's blocks of code, in order.

    A text block right below one is what that prints; a block of code without one prints nothing.
    """
    steps: list[Step] = []
    end = 0  # of the block before
    for block in FENCED.finditer(text):
        kind, content = block[1], block[2]
        if kind == "python":
            steps.append(Step(text.count("\n", 0, block.start(2)) + 1, content))
        else:
            assert kind == "text" and steps, f"a block of {kind or 'nothing'}"
            assert not steps[-1].printed and not text[end : block.start()].strip(), (
                f"a text block that stands below no code: {content[:40]!r}"
            )
            steps[-1] = Step(steps[-1].line, steps[-1].code, content)
        end = block.end()
    return steps


def run(step: Step, names: dict) -> str:
    """What the code prints. It sees and sets `names`; a traceback has the document's lines."""
    code = compile("\n" * (step.line - 1) + step.code, str(TOUR), "exec")
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return printed.getvalue()


def agree(said: str, real: str) -> bool:
    """Whether two lines are the same, but for the last digits of numbers with a point."""
    if NUMBER.sub("#", said) != NUMBER.sub("#", real):
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(real))
    return all(abs(float(a) - float(b)) <= TOLERANCE for a, b in pairs)


def differences(step: Step, printed: str) -> str:
    """What is printed otherwise than it is said, as a diff; "" when nothing is."""
    said, real = step.printed.splitlines(), printed.splitlines()
    for i, (a, b) in enumerate(zip(said, real)):
        real[i] = a if agree(a, b) else b
    where = f"{TOUR.name}, below the code on line {step.line}"
    return "\n".join(difflib.unified_diff(said, real, where, "what is printed", "", "", 1, ""))


@pytest.fixture
def one_thread():
    """The tour starts the process group itself; it is left even where a block fails."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    stop()
    torch.set_num_threads(threads)


def test_the_code_prints_what_the_tour_says(one_thread):
    names: dict = {"__name__": "tour"}
    wrong = [differences(step, run(step, names)) for step in steps_of(TOUR.read_text())]
    if any(wrong):
        pytest.fail("\n".join(filter(None, wrong)), pytrace=False)


def test_links_lead_to_files_that_are_there():
    links = LINK.findall(FENCED.sub("", TOUR.read_text()))
    paths = [link.partition("#")[0] for link in links if "://" not in link]
    assert paths
    assert [path for path in paths if not (TOUR.parent / path).exists()] == []
