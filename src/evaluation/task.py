"""What evaluation needs to know of a task."""

import re
from collections.abc import Callable
from dataclasses import dataclass

# Where a model that goes on after its answer begins the next question, and by what it is known that
# it has answered: a question that an answer repeats before is its own.
_ANSWERED = re.compile(
    r"#### ?[$-]{0,2}[0-9]|\\(?:boxed|fbox)(?![A-Za-z])"
    r"|(?i:answer is|answer:)[^\n]{0,40}[0-9\\]"
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
    and the reward; symbolic: (response, gold) → right or wrong by one more rule, which takes time,
    or None where a limit cut it off; stop: strings that end a response wherever they stand.
    """

    name: str
    grade: Callable[[str, str], dict[str, bool]]
    answer_of: Callable[[str], str | None]
    gold_of: Callable[[dict], str]
    metric: str
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

        It ends before the first of the stop strings. Once an answer was given (`#### N`, a box,
        or "answer is" and a number) it also ends before a line that begins with "Question:",
        "Problem:", "Instruction:" or "Q:".
        """
        for stop in (*self.stop, *stop_strings):
            response = response.partition(stop)[0]
        start = max(0, response.rfind("</think>"))
        answered = _ANSWERED.search(response, start, start + _SCANNED)
        if answered is None:
            return response
        following = _NEXT_QUESTION.search(response, answered.end(), start + _SCANNED)
        return response if following is None else response[: following.start()].rstrip()
