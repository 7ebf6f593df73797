"""Which tokens of a row are trained on."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from src.errors import UserError

if TYPE_CHECKING:
    from src.data.tokenizer import Tokenizer

Span = tuple[int, int]  # [start, stop) of token ids
Marker = str | tuple[int, ...]  # a text, or token ids


@dataclass(frozen=True)
class LossMask:
    """The assistant's last turn, all of them, or every token.

    response_template: what every turn of the assistant follows, instruction_template: what ends
    one, if it is not the row's end: then turns are looked for by these, and not by the template.
    """

    loss_on: Literal["last", "all_assistant", "everything"] = "all_assistant"
    response_template: Marker | None = None
    instruction_template: Marker | None = None

    def spans(self, tokenizer: "Tokenizer", ids: list[int], turns: list[list[Span]]) -> list[Span]:
        """The ranges of a row's ids that are trained on.

        turns: those of the assistant, as the chat template has them. Raises UserError where there
        are none, or the markers are not there.
        """
        if self.loss_on == "everything":
            return [(0, len(ids))]
        if self.response_template is not None:
            turns = [[span] for span in self._marked(tokenizer, ids)]
        if not turns:
            raise UserError("has no turn of the assistant to train on")
        return turns[-1] if self.loss_on == "last" else [span for turn in turns for span in turn]

    def _marked(self, tokenizer: "Tokenizer", ids: list[int]) -> list[Span]:
        """The ids behind each response template, up to the next instruction template."""
        assert self.response_template is not None
        begins = [stop for _, stop in _places(tokenizer, ids, self.response_template)]
        if not begins:
            raise UserError(
                f"--response_template {_shown(self.response_template)}: is not in the row, which "
                f"is {tokenizer.spelled(ids)[:300]!r}; give it as it stands there, or as ids"
            )
        ends = [len(ids)]
        if self.instruction_template is not None:
            ends = [start for start, _ in _places(tokenizer, ids, self.instruction_template)] + ends
        elif len(begins) > 1:
            raise UserError(
                f"--response_template {_shown(self.response_template)}: is there "
                f"{len(begins)} times, and where the turns between end is not known; give "
                "--instruction_template, too"
            )
        return [(begin, min(end for end in ends if end >= begin)) for begin in begins]


ANSWERS = LossMask()


def _places(tokenizer: "Tokenizer", ids: list[int], marker: Marker) -> list[Span]:
    """Where a marker stands in the ids; of a text all the tokens that have a character of it."""
    if not isinstance(marker, str):
        n = len(marker)
        return [(i, i + n) for i in range(len(ids) - n + 1) if tuple(ids[i : i + n]) == marker]

    def length(i: int) -> int:
        """Of the text with the first i + 1 tokens: it only grows."""
        return len(tokenizer.spelled(ids[: i + 1]))

    text, found, every = tokenizer.spelled(ids), list[Span](), range(len(ids))
    start = text.find(marker)
    while start >= 0:
        stop = start + len(marker)
        first = bisect_right(every, start, key=length)
        found.append((first, bisect_left(every, stop, lo=first, key=length) + 1))
        start = text.find(marker, stop)
    return found


def _shown(marker: Marker) -> str:
    return repr(marker) if isinstance(marker, str) else str(list(marker))
