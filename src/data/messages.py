"""Conversations in data rows: the forms that data sets have, checked, and put into one.

A row's conversation is `messages` ({"role", "content"}, perhaps `tool_calls`), ShareGPT's
`conversations` ({"from", "value"}), or parts of one: `prompt` with `completion`, or with `chosen`
and `rejected`, each a text or messages. Beside it may stand `tools`. In our form a row has an
`instruction`, which is a text or `Messages` up to where an answer is to begin, and outputs that are
texts or `Messages` that go on from there.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

Message = dict[str, Any]  # "role" and "content", perhaps "tool_calls" and more

UNUSABLE = re.compile("[\0\ud800-\udfff]")  # what no tokenizer and no UTF-8 file can hold
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
ANSWERING, ASKING = ("assistant",), ("user", "tool", "ipython", "function")
# ShareGPT's names of who speaks, and some that are about.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
DEEPEST = 100  # objects and lists within one another: what writes them goes down by recursion
WHOLE = ("messages", "conversations", "conversation")  # fields that hold a whole conversation
NOT_LEARNED = {"weight", "train", "training"}  # other trainers' marks of single messages, if 0
SIDES = ("chosen", "rejected", "ranked")
PARTS = ("prompt", "completion", "instruction", "output")


class Messages(list[Message]):
    """A conversation, or a part of one. tools: what the model may call, as JSON schemas."""

    def __init__(self, messages: list[Message], tools: list[dict] | None = None) -> None:
        super().__init__(messages)
        self.tools = tools

    def __add__(self, others: list[Message]) -> "Messages":  # type: ignore[override]
        return Messages([*self, *others], self.tools)


Question = str | Messages


class _Wrong(ValueError):
    """What is wrong with a conversation, for a message that names its field."""


def put_in_form(
    row: dict, required: Collection[str], fields: Collection[str], whole: bool
) -> tuple[list[str], set[str]]:
    """Give a row's conversation our form; what is wrong with it, and the fields it was made of.

    required, fields: those of our form that must be there, and all that are read; whole: whether
    all answers of a conversation are an output, not the last alone.
    """
    used: set[str] = set()
    if not row.keys() & {*WHOLE, *SIDES, *PARTS, "tools"}:
        return [], used
    field = "tools"
    try:
        tools = _tools_of(row.get(field))
        field = "instruction"
        if isinstance(row.get(field), list) and row[field]:
            row[field] = Messages(_messages_of(row, field), tools)
        if not _says(row.get("instruction")):
            # A prompt, or a whole conversation.
            field = "prompt"
            if (prompt := _part(row, field, tools)) is not None:
                row["instruction"] = prompt
                used.add(field)
            for field in WHOLE:
                if _says(row.get(field)) and not _says(row.get("instruction")):
                    _split(
                        row, Messages(_messages_of(row, field), tools), "output" in required, whole
                    )
                    used |= {field, "system"}
        field = "completion"
        completion = _part(row, field, tools)
        if completion is not None and "output" in fields and not _says(row.get("output")):
            row["output"] = _learned(completion)
            used.add(field)
        field = "output"
        if isinstance(row.get(field), list) and any(isinstance(x, dict) for x in row[field]):
            row[field] = _learned(Messages(_messages_of(row, field), tools))
        # What is compared.
        sides = dict[str, list[Any]]()
        for field in SIDES:  # which a message about it names
            if field in fields:
                sides[field] = _alternatives(row, field, tools)
        if any(isinstance(text, Messages) for side in sides.values() for text in side):
            field = next(iter(sides))
            _without_prompt(row, sides, tools)
        if isinstance(row.get("output"), Messages):
            field = "completion" if "completion" in used else "output"
            if isinstance(row.get("instruction"), str):
                row["instruction"] = Messages([_user(row["instruction"])], tools)
            _check_goes_on(row["output"], row.get("instruction"))
            if not any(message["role"] in ANSWERING for message in row["output"]):
                raise _Wrong("has no message of the assistant, to learn from")
    except _Wrong as wrong:
        return [f'field "{field}": {wrong}'], used
    if isinstance(row.get("instruction"), Messages):
        used.add("tools")
    return [], used


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _says(value: Any) -> bool:
    return isinstance(value, list) and bool(value) or isinstance(value, str) and bool(value.strip())


def _part(row: dict, field: str, tools: list[dict] | None) -> Question | None:
    """A text, or messages; None where the field is neither, which is for others to say."""
    value = row.get(field)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value:
        return Messages(_messages_of(row, field), tools)
    return None


def _split(row: dict, messages: Messages, has_output: bool, whole: bool) -> None:
    """Put a whole conversation into a row's instruction and output.

    has_output: whether there must be one.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] in ANSWERING]
    if not has_output or _says(row.get("output")):
        # A prompt: an answer behind it is what it should lead to.
        if messages[-1]["role"] in ANSWERING and len(messages) > 1:
            if not _says(row.get("output")) and (text := _plain(messages[-1:])) is not None:
                row["output"] = text
            messages = Messages(messages[:-1], messages.tools)
        if messages[-1]["role"] not in ASKING:
            raise _Wrong(
                f"ends with the {messages[-1]['role']}'s message: what is asked is missing"
            )
        row["instruction"] = messages
        return
    if not answers:
        raise _Wrong("has no message of the assistant, to learn from")
    first = answers[0] if whole else answers[-1]
    if not whole and answers[-1] != len(messages) - 1:
        raise _Wrong(f"ends with the {messages[-1]['role']}'s message, not with an answer")
    row["instruction"] = Messages(messages[:first], messages.tools)
    row["output"] = _learned(Messages(messages[first:], messages.tools))
    if not whole:
        row["output"] = _plain(row["output"]) or row["output"]


def _learned(output: Question) -> Question:
    """An output. Raises `_Wrong` where a message of it is marked as one that is not learned."""
    for message in output if isinstance(output, Messages) else ():
        for key in NOT_LEARNED & message.keys() if message["role"] in ANSWERING else ():
            if message[key] != 1:
                raise _Wrong(
                    f"has an assistant's message with {key} {str(message[key])[:40]}, which is not "
                    "read: --loss_on says which turns are learned; take the field out, or the turn"
                )
    return output


def _plain(messages: list[Message]) -> str | None:
    """The text of an answer that is nothing but a text."""
    keys = {key for message in messages for key, value in message.items() if value is not None}
    if len(messages) == 1 and keys == {"role", "content"} and messages[0]["role"] in ANSWERING:
        return messages[0]["content"]
    return None


def _alternatives(row: dict, field: str, tools: list[dict] | None) -> list[Any]:
    """The outputs of one side of a comparison, where they are messages."""
    value = row.get(field)
    if not isinstance(value, list) or not any(isinstance(x, (dict, list)) for x in value):
        return []  # texts, or what others refuse
    several = value if isinstance(value[0], list) else [value]
    return [
        Messages(_messages_of({field: one}, field), tools) if isinstance(one, list) else one
        for one in several
    ]


def _without_prompt(row: dict, sides: dict[str, list[Any]], tools: list[dict] | None) -> None:
    """Give a row of compared conversations the prompt that they share, and the sides the rest."""
    conversations = [x for side in sides.values() for x in side]
    if not all(isinstance(x, Messages) for x in conversations) or not all(sides.values()):
        raise _Wrong("holds messages beside texts; write all outputs in one form")
    prompt = row.get("instruction")
    if isinstance(prompt, str) and prompt.strip():
        prompt = Messages([_user(prompt)], tools)
    if not isinstance(prompt, Messages):
        same = takewhile(lambda at: all(x == at[0] for x in at), zip(*conversations))
        shared = [at[0] for at in same]
        # Up to the last question: an answer that all begin with is part of the outputs.
        while shared and (shared[-1]["role"] not in ASKING or len(shared) == len(conversations[0])):
            shared.pop()
        if not shared:
            raise _Wrong("share no messages up to a question, and the row has no prompt")
        prompt = Messages(shared, tools)
        starts = [len(shared)] * len(conversations)
    else:
        n = len(prompt)
        starts = [n if list(x[:n]) == list(prompt) else 0 for x in conversations]
    row["instruction"] = prompt
    rest = iter(Messages(x[start:], tools) for x, start in zip(conversations, starts))
    for field, side in sides.items():
        outputs = [next(rest) for _ in side]
        for output in outputs:
            if not output or output[-1]["role"] not in ANSWERING:
                raise _Wrong("ends with no message of the assistant")
            _check_goes_on(output, prompt)
        plain = [_plain(output) for output in outputs]
        row[field] = [text if text else output for text, output in zip(plain, outputs)]


def _check_goes_on(output: Messages, prompt: Any) -> None:
    """Raise `_Wrong` where an output begins as conversations do, and not where its prompt ends."""
    role = output[0]["role"]
    asks_again = isinstance(prompt, Messages) and prompt[-1:] and prompt[-1]["role"] == role
    if role in ("system", "developer") or role == "user" and asks_again:
        raise _Wrong(
            f"begins with the {role}'s message, and not with the row's prompt, which would stand "
            "before it once more; make the two the same in chosen and rejected, or leave one out"
        )


# --- Messages -------------------------------------------------------------------------------------


def _messages_of(row: dict, field: str) -> list[Message]:
    """A field's messages, in OpenAI's form. Raises `_Wrong` where they are none."""
    given = row[field]
    if not isinstance(given, list):
        raise _Wrong("is a text, expected a list of messages")
    messages = []
    for i, value in enumerate(given):
        try:
            messages.append(_message_of(value))
        except _Wrong as wrong:
            raise _Wrong(f"message {i} (from 0) {wrong}") from None
    system = row.get("system")
    if field in WHOLE and (system.strip() if isinstance(system, str) else system):
        if messages[0]["role"] == "system":
            raise _Wrong('begins with a system\'s message, and the row has a field "system", too')
        try:
            messages.insert(0, _message_of({"role": "system", "content": system}))
        except _Wrong as wrong:
            raise _Wrong(f'goes with the row\'s field "system", which {wrong}') from None
    return messages


def _message_of(value: Any) -> Message:
    if not isinstance(value, dict):
        raise _Wrong(f"is {type(value).__name__}, expected an object with role and content")
    message = {key: part for key, part in value.items() if part is not None}
    speaker = message.pop("from", None)
    if speaker is not None and "role" not in message:
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise _Wrong(f"is from {str(speaker)[:40]!r}; known are {', '.join(SPEAKERS)}")
        message["role"], text = SPEAKERS[speaker], message.pop("value", None)
        if speaker == "function_call":
            message["tool_calls"] = _json(text, "value")
        else:
            message["content"] = text
    role = message.get("role")
    if role not in ROLES:
        raise _Wrong(f"has the role {str(role)[:40]!r}; known are {', '.join(ROLES)}")
    if "content" in message:
        message["content"] = _text_of(message["content"])
    if "tool_calls" in message:
        message["tool_calls"] = _calls_of(message["tool_calls"])
        if not message["tool_calls"]:
            del message["tool_calls"]
        elif role not in ANSWERING:
            raise _Wrong(f"is the {role}'s and has tool_calls, which only the assistant makes")
    if "content" not in message and "tool_calls" not in message:
        raise _Wrong("has no content")
    _check_texts(message)
    return message


def _text_of(content: Any) -> str:
    """A message's text; of a list of parts their texts, one after the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _Wrong(f"has a content of type {type(content).__name__}, expected a string")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind in ("text", None) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            raise _Wrong(f"has a part of type {str(kind)[:40]!r}; only text is read")
    return "".join(texts)


def _calls_of(calls: Any) -> list[dict]:
    """Tool calls in OpenAI's form, but that arguments are objects, as templates take them."""
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise _Wrong(f"has tool_calls of type {type(calls).__name__}, expected a list")
    formed = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Wrong("has a tool call without a function's name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments, f"arguments of {function['name'][:40]}")
        if not isinstance(arguments, dict):
            raise _Wrong(f"calls {function['name'][:40]} with arguments that are no object")
        said = {key: part for key, part in function.items() if part is not None}
        said["arguments"] = arguments
        rest = {key: part for key, part in call.items() if part is not None}
        rest = rest if "function" in call else {"type": "function"}
        formed.append(rest | {"function": said})
    return formed


def _tools_of(value: Any) -> list[dict] | None:
    """Schemas of tools, from a list or its JSON; None where there are none."""
    if isinstance(value, str) and value.strip():
        value = _json(value, "tools")
    if not value or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _Wrong("expected a list of JSON schemas, each an object")
    _check_texts(value)
    return value


def _json(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise _Wrong(f"has {what} that are not JSON: {str(text)[:60]!r}") from None


def _check_texts(value: Any, depth: int = 0) -> None:
    """Raise `_Wrong` for a text within, or a key, that no tokenizer can hold, and for too deep."""
    if isinstance(value, str):
        if UNUSABLE.search(value):
            raise _Wrong(f"holds a NUL or an unpaired surrogate in {value[:40]!r}")
    elif isinstance(value, (dict, list)):
        if depth > DEEPEST:
            raise _Wrong(f"holds objects or lists nested more than {DEEPEST} deep")
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_texts(part, depth + 1)


# --- What is trained on ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversation:
    """Messages, and from which of them on the assistant's may be trained on: before is a prompt."""

    messages: Messages
    first: int = 0

    @property
    def turns(self) -> list[int]:
        """The places of the assistant's messages that are trained on."""
        return [
            i
            for i, message in enumerate(self.messages)
            if i >= self.first and message["role"] in ANSWERING
        ]
