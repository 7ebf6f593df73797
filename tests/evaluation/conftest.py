"""What is quick, on the machine at hand."""

import time

import pytest


@pytest.fixture(scope="session")
def a_moment() -> float:
    """Seconds of this process that plain Python takes to add up eight million numbers.

    That is a tenth of a second on a quick machine, and more on a slow one. What is not linear in a
    text of a megabyte takes many times as long.
    """

    def seconds() -> float:
        start = time.process_time()
        sum(range(1_000_000))
        return time.process_time() - start

    return 8 * min(seconds() for _ in range(5))
