"""What evaluation needs to know of a task."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task's rules. The functions' contracts are those of `src/evaluation/gsm8k.py`.

    grade: (response, gold) → right or wrong by each rule; score: (responses, golds, truncated) →
    (summary, a row for each); gold_of: a data row → its gold; stop: generation ends at the first of
    these strings; metric: the key of grade and score that is the headline.
    """

    name: str
    grade: Callable[[str, str], dict[str, bool]]
    score: Callable[..., tuple[dict, list[dict]]]
    gold_of: Callable[[dict], str]
    stop: tuple[str, ...]
    metric: str
