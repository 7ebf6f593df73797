"""What evaluation needs to know of a task."""

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass

# What may stand between "the answer is" or `####` and its number: money, formulas, bold type.
_SIGNS = r"(?:[ \t:*_$~=(\[{€£+−–-]|\\[(\[$ ]|\\(?:text|textbf|mathbf)\{){0,12}"
# What follows `#### ` where it is a heading: "1. Understand", "2) Compute", "3: Check".
HEADING = (
    r"[ *(]{0,9}[0-9]{1,2}(?:\.[0-9]{1,2})?(?:[.):]|[ \t]{1,3}[-–—])"
    r"[*]{0,3}[ \t]{1,3}[*]{0,3}[A-Za-z]"
)
# An answer that is said: directly, and not asked for.
SAID = (
    rf"(?i:answer is|answer:)(?={_SIGNS}(?:[A-Za-z] ?= ?)?{_SIGNS}\.?"
    r"(?:(?![0-9.,]{1,20} ?\?)[0-9]|\\[A-Za-z]))"
)
# What a box holds that is only spoken of: nothing, dots, or the word "answer".
_BLANK = r"(?:[\s.,_?…~$-]|\\[^A-Za-z]|\\(?:[lc]?dots|q?quad)(?![A-Za-z]))*"
EMPTY_BOX = (
    rf"\s*\{{{_BLANK}(?:(?:\\text\s?\{{ ?)?(?i:(?:(?:your|the|final) ){{0,3}}answer(?: here)?) ?"
    rf"\}}?{_BLANK})?\}}"
)
# Where a model that goes on after its answer begins the next question, and by what it is known that
# it has answered: a question that an answer repeats before is its own.
_ANSWERED = re.compile(
    rf"####(?!{HEADING}){_SIGNS}\.?[0-9]|\\(?:boxed|fbox)(?![A-Za-z])(?!{EMPTY_BOX})|{SAID}"
)
_NEXT_QUESTION = re.compile(
    r"(?m)^(?:#{1,6} |\*\*)?(?:Question|Problem|Instruction|Q)(?: [0-9]{1,4})?:"
)
_SCANNED = 65_536  # characters of a response, after its reasoning, in which a next question is seen


@dataclass(frozen=True)
class Task:
    """A task's rules. The functions' contracts are those of `src/evaluation/gsm8k.py`.

    grade: (response, gold) → right or wrong by each rule that takes no time; answer_of: response →
    the answer in it, or None; gold_of: a data row → its gold; metric: the rule that is the headline
    and the reward; taken: (rule, response) → the answer that this rule compares, equal where the
    rule takes two for the same, or None; check_gold: (rule, gold), raises UserError for a gold that
    this rule cannot compare; symbolic: (response, gold) → right or wrong by one more rule, which
    takes time, or None where a limit cut it off; stop: strings that end a response wherever they
    stand.
    """

    name: str
    grade: Callable[[str, str], dict[str, bool]]
    answer_of: Callable[[str], str | None]
    gold_of: Callable[[dict], str]
    metric: str
    taken: Callable[[str, str], Hashable | None]
    check_gold: Callable[[str, str], None]
    symbolic: Callable[[str, str], bool | None] | None = None
    stop: tuple[str, ...] = ("</s>", "<|im_end|>")

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of all rules."""
        return (*self.grade("", "0"), *(("symbolic",) if self.symbolic else ()))

    def verdicts(self, response: str, gold: str) -> dict[str, bool | None]:
        """Right or wrong by each of `rules`; None where a limit cut the comparison off."""
        more = {"symbolic": self.symbolic(response, gold)} if self.symbolic else {}
        return {**self.grade(response, gold), **more}

    def is_right(self, response: str, gold: str) -> bool:
        """Whether the response is right by `metric`; no other rule is asked."""
        if self.symbolic is not None and self.metric == "symbolic":
            return bool(self.symbolic(response, gold))
        return self.grade(response, gold)[self.metric]

    def read(self, response: str, stop_strings: tuple[str, ...] = ()) -> str:
        """The part of a response that is graded, whichever way it came.

        It ends before the first of the stop strings. Once an answer was given (`#### N` that is no
        heading, a box that holds something, or a number right after "answer is") it also ends
        before a line that begins with "Question:", "Problem:", "Instruction:" or "Q:".
        """
        for stop in (*self.stop, *stop_strings):
            response = response.partition(stop)[0]
        start = max(0, response.rfind("</think>"))
        answered = _ANSWERED.search(response, start, start + _SCANNED)
        if answered is None:
            return response
        following = _NEXT_QUESTION.search(response, answered.end(), start + _SCANNED)
        return response if following is None else response[: following.start()].rstrip()
