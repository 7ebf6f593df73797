"""Where in a chat template's text of a conversation the assistant's turns lie: what is trained on.

A template may mark them itself ({% generation %}). Else they are found by what it writes when one
message is another: a turn begins where, after the message before, an answer is to begin, and ends
with the token that ends it. Whatever a row's template does, each turn is verified, or refused.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from src.data.chat import Chat, Thought, is_held
from src.data.messages import Conversation, Message
from src.errors import UserError

Span = tuple[int, int]  # [start, stop)
_SENTINEL = "\ufdd4"  # no character: no text holds it, and no template changes it


def assistant_spans(
    chat: Chat, conversation: Conversation, ends: re.Pattern, before_end: str = ""
) -> tuple[str, list[list[Span]]]:
    """The template's text, and the spans of characters in it of each turn that is trained on.

    ends: the tokens that may end a turn; before_end: what the template writes between an answer and
    that. Raises UserError where a turn cannot be found for certain.
    """
    messages, tools = conversation.messages, conversation.messages.tools
    text, marked = chat.marked(messages, tools)
    if marked:
        return text, _of_marks(chat, conversation, text, marked)
    if not conversation.turns:
        return text, []
    contents = _plain_places(chat, messages, tools, text)
    finder = _Finder(chat, messages, tools, text, ends, before_end, contents)
    spans = [finder.span(place) for place in conversation.turns]
    for (_, stop), (start, _) in zip(spans, spans[1:]):
        if start < stop:
            raise UserError("the template writes one turn into another")
    return text, [[span] for span in spans]


def _of_marks(
    chat: Chat, conversation: Conversation, text: str, marked: list[Span]
) -> list[list[Span]]:
    """The spans that a template marks itself, by the turns that are trained on."""
    messages, tools, spans = conversation.messages, conversation.messages.tools, []
    every = Conversation(messages).turns
    for place in conversation.turns:
        if len(every) == len(marked):
            before, upto = every.index(place), every.index(place) + 1
        else:  # as many marks as there are without it are others' turns
            before = len(chat.marked(messages[:place], tools)[1]) if place else 0
            upto = len(chat.marked(messages[: place + 1], tools)[1])
        if upto > len(marked) or before == upto:
            raise UserError(f"the template marks no generation for message {place} (from 0)")
        spans.append(marked[before:upto])
        turn = "".join(text[start:stop] for start, stop in spans[-1])
        _check_calls(messages[place], turn, f"message {place} (from 0), the assistant's,")
    return spans


def tokens_of(offsets: Sequence[Span], span: Span) -> Span:
    """The tokens that have a character of a span. offsets: of each token, in order."""
    start = bisect_right(offsets, span[0], key=lambda offset: offset[1])
    return start, max(start, bisect_left(offsets, span[1], key=lambda offset: offset[0]))


@dataclass(frozen=True)
class _Place:
    """Where in the text a message's own text lies, [start, stop), and how that was found.

    other: the message with the sentinel, in its place; after: what the template writes behind that.
    """

    start: int
    stop: int
    other: Message
    after: str


def _plain_places(
    chat: Chat, messages: list[Message], tools: list[dict] | None, text: str
) -> dict[int, _Place]:
    """Where the plain texts of messages lie, if the template writes each as it stands, or stripped.

    Found at once: in what it writes of numbered sentinels, whose text between them must be the
    conversation's. {} where it is not: then each is looked for.
    """
    others = {
        i: message | {"content": f"{_SENTINEL}{i}{_SENTINEL}"}
        for i, message in enumerate(messages)
        if isinstance(message.get("content"), str) and not message.get("tool_calls")
    }
    try:
        written = chat.text_of([others.get(i, m) for i, m in enumerate(messages)], tools)
    except UserError:  # it refuses such a conversation
        return {}
    pieces = re.split(f"{_SENTINEL}([0-9]+){_SENTINEL}", written)
    between, numbers = pieces[::2], [int(number) for number in pieces[1::2]]
    places, position = dict[int, _Place](), len(between[0])
    if not text.startswith(between[0]) or sorted(numbers) != sorted(others):
        return {}
    for number, following in zip(numbers, between[1:]):
        said = messages[number]["content"]
        stop = next(
            (
                position + len(way)
                for way in (said, said.strip(), said.lstrip(), said.rstrip())
                if text.startswith(way, position)
                and text.startswith(following, position + len(way))
            ),
            None,
        )
        if stop is None:
            return {}
        places[number] = _Place(position, stop, others[number], "")
        position = stop + len(following)
    return places if position == len(text) else {}


@dataclass(frozen=True)
class _Finder:
    """Finds turns in `text`, which the template writes of the messages."""

    chat: Chat
    messages: list[Message]
    tools: list[dict] | None
    text: str
    ends: re.Pattern
    before_end: str
    contents: dict[int, _Place]

    def span(self, place: int) -> Span:
        """A turn, from where generation begins to the token that ends it.

        That is past the text's end where the last turn has none.
        """
        where = f"message {place} (from 0), the assistant's,"
        content = self._content(place)
        start = self._start(place, content.start)
        if start is None or start > content.stop:
            raise UserError(f"{where} does not begin where the template's prompt ends")
        end = self._end(place, content)
        if end is None:
            raise UserError(f"{where} is followed by no token that ends it")
        self._check_whole(place, end, where)
        return start, end

    def _check_whole(self, place: int, end: int, where: str) -> None:
        """Raise UserError where what the message says stands elsewhere, or its calls do not."""
        since = self._content(place - 1).stop if place else 0  # what opens a thought among it
        message, turn = self.messages[place], self.text[since:end]
        said = message.get("content")
        if isinstance(said, str) and not is_held(said, turn):
            if is_held(said, self.text):
                raise UserError(f"{where} does not stand where its turn is")
            self.chat.left_out.add(said)
        if place + 1 < len(self.messages) and self._content(place + 1).start < end:
            raise UserError(f"{where} holds the next one's text")
        _check_calls(message, turn, where)

    def _content(self, place: int) -> _Place:
        """Where a message's own text lies."""
        if place not in self.contents:
            self.contents[place] = self._found(place)
        return self.contents[place]

    def _found(self, place: int) -> _Place:
        for other in _otherwise(self.messages[place]):
            messages = [*self.messages[:place], other, *self.messages[place + 1 :]]
            try:
                written = self.chat.text_of(messages, self.tools)
            except UserError:  # it refuses such a conversation
                continue
            if written.count(_SENTINEL) == 1:
                before, after = written.split(_SENTINEL)
                start = len(_common(self.text, before))
                kept = len(_common(self.text[start:][::-1], after[::-1]))
                return _Place(start, len(self.text) - kept, other, after)
        role = self.messages[place]["role"]
        raise UserError(f"the template does not write message {place} (from 0), of role {role}")

    def _end(self, place: int, content: _Place) -> int | None:
        """Behind the token that ends a turn. content: where its own text lies."""
        if "tool_calls" in content.other:  # which goes on: as far as it does where nothing follows
            alone = self.chat.text_of([*self.messages[:place], content.other], self.tools)
            rest = _common(alone.rpartition(_SENTINEL)[2], content.after)
            last = max((end.end() for end in self.ends.finditer(rest)), default=None)
            return None if last is None else len(self.text) - len(content.after) + last
        end = self.ends.search(self.text, content.stop)
        between = self.text[content.stop : end.start() if end else None]
        if between.strip() not in ("", self.before_end.strip()):
            return None
        if end is None:
            return len(self.text) + 1 if place == len(self.messages) - 1 else None
        return end.end()

    def _start(self, place: int, begin: int) -> int | None:
        """Where generation of a turn begins: after what follows the message before.

        begin: where its own text does.
        """
        if place:
            stop = self._content(place - 1).stop
            for closing in self._closings(place):
                if self.text.startswith(closing, stop):
                    return stop + len(closing)
        opening = self.chat.opening
        found = self.text.rfind(opening, 0, begin) if opening.strip() else -1
        return None if found < 0 else found + len(opening)

    def _closings(self, place: int) -> Iterator[str]:
        """What the template may write between the message before a turn and the turn."""
        if self.messages[place - 1]["role"] == "user":
            yield from _with_thought_or_without(self.chat.closing)
        for other in _otherwise(self.messages[place - 1]):
            try:
                messages = [*self.messages[: place - 1], other]
                text = self.chat.before_answer(messages, self.tools)
            except UserError:  # it refuses such a conversation
                continue
            yield from _with_thought_or_without(text.rpartition(_SENTINEL)[2])


def _with_thought_or_without(closing: str) -> Iterator[str]:
    """A prompt's end may open a thought that an earlier or plain answer is written without."""
    yield closing
    thought = Thought.at_end(closing)
    if thought:
        yield closing[: thought.start]


def _check_calls(message: Message, turn: str, where: str) -> None:
    """Raise UserError where a template's text of a turn lacks one of its tool calls."""
    for call in message.get("tool_calls") or []:
        name = call.get("function", call).get("name")
        if name not in turn:
            raise UserError(f"{where} calls {name}, which the template leaves out")


def _common(a: str, b: str) -> str:
    """What two texts both begin with."""
    same, size = 0, min(len(a), len(b))
    while same < size:  # by halves: comparing is quick
        half = (same + size + 1) // 2
        if a[same:half] == b[same:half]:
            same = half
        else:
            size = half - 1
    return a[:same]


def _otherwise(message: Message) -> list[Message]:
    """A message with the sentinel in place of what it says, or else in its last call."""
    plain = {k: v for k, v in message.items() if k not in ("tool_calls", "content")}
    ways = [plain | {"content": _SENTINEL}]
    calls: Any = message.get("tool_calls")
    if calls:
        *others, last = calls
        for part in ({"arguments": {_SENTINEL: 0}}, {"name": _SENTINEL}):
            changed = last.get("function", last) | part
            last_changed = last | {"function": changed} if "function" in last else changed
            ways.append(message | {"tool_calls": [*others, last_changed]})
    return ways
