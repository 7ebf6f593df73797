"""The process in which `symbolic.py` compares answers: math-verify on lines of JSON.

It reads `[gold, text]` and writes `true` or `false`, until its input ends. It is run by its path
and imports nothing of this project: a comparison that is too long or too large ends it alone.
"""

import json
import resource
import signal
import sys
from contextlib import suppress

CPU_SECONDS = 2.0  # of one comparison
MEMORY = 1 << 30  # bytes of address space, the libraries' included
# Two numbers closer than this, relative to their size, are equal: 0.333333 is 1/3. (The library
# rounds to six places, by which all small numbers would be 0.)
TOLERANCE = 1e-5


def main() -> None:
    """Answer until the input ends, which it does when the parent is gone, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        same = _comparison()
    except ImportError as error:
        print(json.dumps(str(error)), flush=True)
        return
    print("true", flush=True)  # ready
    for line in sys.stdin:
        gold, text = json.loads(line)
        # SIGPROF comes when so much of the processor's time is used, and ends the process.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        verdict = same(gold, text)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


def _comparison():
    """same(gold, text): whether the answer that the library finds in the text is the gold's."""
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from sympy import And, Eq, Expr

    logging.disable(logging.CRITICAL)  # the library logs what it cannot read
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def read(text: str) -> list:
        return [_result(value, Eq, And) for value in parse(text, kinds, parsing_timeout=None)]

    def equal(gold: list, answer: list) -> bool:
        return verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None)

    def same(gold: str, text: str) -> bool:
        try:
            golds, answers = read(gold), read(text)
            # Both ways: one way it takes (2, 1) for the set {1, 2}, and 2x = 5 for 5.
            if not (equal(golds, answers) and equal(answers, golds)):
                return False
            numbers = [values[0] for values in (golds, answers)]
            if all(isinstance(value, Expr) and value.is_number for value in numbers):
                return _is_close(*(value.doit().evalf() for value in numbers))
            return True
        except Exception:  # whatever it raises about a text that a model wrote: it is not right
            return False

    return same


def _result(value, Eq, And):
    """The right side of a computation that is written out, `2 + 3 = 5`; else the value.

    Raises ValueError where it does not come out: by the library `10 / 3 = 5` is 5.
    """
    steps = getattr(value, "_unsorted_args", value.args) if isinstance(value, And) else [value]
    if not all(isinstance(step, Eq) and not step.free_symbols for step in steps):
        return value
    if not all(_is_close(*(side.doit().evalf() for side in step.args)) for step in steps):
        raise ValueError(f"{value} is false")
    return steps[-1].rhs


def _is_close(one, other) -> bool:
    return one == other or bool(abs(one - other) <= TOLERANCE * abs(other))


if __name__ == "__main__":
    main()
