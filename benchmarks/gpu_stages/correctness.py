"""tests/gpu, on the device."""

import sys

import pytest
from common import ROOT

from gpu_stages.shared import SMALL, Say, Sizes
from src.parallel.setup import pick_device


def measure(sizes: Sizes, say: Say) -> None:
    class Recorder:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                why = "" if report.passed else str(report.longrepr)[-300:]
                say(test=report.nodeid, outcome=report.outcome, s=report.duration, why=why)

    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--device", pick_device().type]
    if sizes is SMALL:  # each takes as long as all else, and says little on a CPU
        for file in ("ranks", "kernels"):
            options += ["--ignore", str(ROOT / "tests" / "gpu" / f"test_gpu_{file}.py")]
    code = pytest.main([*options, str(ROOT / "tests" / "gpu")], [Recorder()])
    if code:
        sys.exit(f"pytest ended with {code!r}")
