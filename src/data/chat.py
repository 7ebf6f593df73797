"""One user's turn and its answer, as a chat template writes them.

This is text only: `src.data.tokenizer` makes ids of it.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from src.checkpoint.json_file import read_json
from src.data.messages import Message, Messages, Question
from src.errors import UserError

# Around what a template says that a model writes ({% generation %}), where that is wanted: two of
# the characters that Unicode keeps free for such use, taken out of the text again.
GENERATED, ENDED = "\ufdd2", "\ufdd3"
# Names under which a message's reasoning may stand.
REASONING = ("reasoning_content", "thinking", "reasoning")
T = TypeVar("T")
SECONDS = 10  # for one text's renderings, each of which takes a fraction of a millisecond
LONGEST = 10**7  # characters that a rendering may have

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
)


def _brackets(question: str, answer: str, system: str) -> str:
    """Llama 2's and Mistral's, of how each role's message `m` is written.

    `ns.system` is a system's text, to be written before a question.
    """
    return (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'user' %}"
        f"{question}{{% elif m.role == 'system' %}}{system}{{% else %}}{answer}"
        "{% endif %}{% endfor %}"
    )


_KEPT = "{% set ns.system = ns.system + m.content + '\n\n' %}"  # until a question comes
_MISTRAL = "{{ bos_token }}" + _brackets(  # its tokenizer puts a space before each text
    "[INST] {{ ns.system }}{{ m.content }} [/INST]{% set ns.system = '' %}",
    " {{ m.content }}{{ eos_token }}",
    _KEPT,
)
# The brackets are control tokens from its second tokenizer on: no space ends the question. The
# system's text goes before the last one.
_ANSWER_ALONE = "{{ (' ' + m.content).rstrip(' ') }}{{ eos_token }}"
_MISTRAL_CONTROL = "{{ bos_token }}" + _brackets(
    "[INST] {% if 'user' not in messages[loop.index:] | map(attribute='role') %}{{ ns.system }}"
    "{% endif %}{{ m.content }}[/INST]",
    _ANSWER_ALONE,
    _KEPT,
)
# Or has control tokens of its own.
_MISTRAL_SYSTEM = "{{ bos_token }}" + _brackets(
    "[INST] {{ m.content }}[/INST]",
    _ANSWER_ALONE,
    "[SYSTEM_PROMPT] {{ m.content }}[/SYSTEM_PROMPT]",
)

# For folders without a template, by the beginning of the family's name. Llama 1 has none.
TEMPLATES = {
    "llama-2": _brackets(
        "{{ bos_token }}[INST] {{ (ns.system + m.content) | trim }} [/INST]"
        "{% set ns.system = '' %}",
        " {{ m.content | trim }} {{ eos_token }}",
        "{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}",
    ),
    "llama-3": "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "mistral": _MISTRAL,
    "mistral [INST]": _MISTRAL_CONTROL,
    "mistral [SYSTEM_PROMPT]": _MISTRAL_SYSTEM,
    "mixtral": _MISTRAL,
    "qwen": _SYSTEM + _CHATML,
    "qwen2": _SYSTEM + _CHATML,
    "qwen3": _CHATML,
}

DEFAULT_DATE = "2024-07-26"  # the day that Llama 3's template writes where it is told none
_QUESTION, _ANSWER = "What is it", "ThisIsTheAnswer"  # words that no template changes
# What may open a thought at a prompt's end: <think>, [THINK], ◁think▷, <|START_THINKING|>.
_OPENING = re.compile(r"<[\w:]+>|[<\[◁]\|?\w*th(?:ink|ought)\w*\|?[>\]▷]", re.IGNORECASE)
_MARK = re.compile(r"[<\[◁]\|?/?\w*th(?:ink|ought)\w*\|?[>\]▷]", re.IGNORECASE)  # and its end


class Thought(NamedTuple):
    """The marks around reasoning that a prompt ends in.

    start: where in the prompt; is_open: whether reasoning goes on from there, or is over.
    """

    opening: str
    closing: str
    start: int
    is_open: bool

    @classmethod
    def at_end(cls, prompt: str) -> "Thought | None":
        """The one that the prompt opens last, or has opened and closed."""
        text = prompt.rstrip()
        for mark in _OPENING.finditer(text):
            closing = _closing(mark[0])
            after = text[mark.end() :].strip()
            if after in ("", closing):
                return cls(mark[0], closing, mark.start(), not after)
        if text.endswith("</think>"):
            return cls("<think>", "</think>", len(text) - len("</think>"), False)
        return None

    def is_in(self, answer: str) -> bool:
        """Whether an answer holds reasoning: begins with it, or ends it."""
        return answer.lstrip().startswith(self.opening) or self.closing in answer

    def not_again(self, answer: str) -> str:
        """The answer without what the prompt has of it: the opening, or an empty thought."""
        marks = [self.opening] if self.is_open else [self.opening, self.closing]
        return re.sub("^" + "".join(rf"\s*{re.escape(mark)}" for mark in marks), "", answer)


def _closing(opening: str) -> str:
    for first, last in (("START", "END"), ("start", "end"), ("begin", "end")):
        if opening.startswith("<|") and first in opening:
            return opening.replace(first, last)
    return f"{opening[0]}/{opening[1:]}"


@dataclass
class Counted:
    """How many texts there were of a kind that a user should know of, and how the first begins."""

    count: int = 0
    first: str = ""

    def add(self, text: str) -> None:
        self.count += 1
        self.first = self.first or text[:80]


class _Limit(threading.local):
    """Whether a thread's work is within a limit of time already."""

    is_on = False


_within_limit = _Limit()


class Chat:
    """How a template writes a question and its answer.

    `prompt(question) + response(answer) + ending` is the template's text of the two messages.
    `name`: where the template is from, for messages. `own`: whether it lies with the model.
    `sample`: such a text, with all that the template writes.

    Counted are the answers `as_they_stand`: written without the template, which would have left out
    or changed a part of them; `begun_otherwise`: that would not begin with the prompt in the
    template's text; `doubled`: with an empty thought before their reasoning; and the questions
    `changed_questions`: that are not in its text as they are; `other_prompts`: whose prompt ends in
    another thought, or none, than the sample's, after which answers are written; and the turns of
    conversations `left_out`: of which the template leaves out a part.
    """

    def __init__(
        self,
        source: str,
        name: str,
        tokens: dict[str, str],
        own: bool = True,
        date: str = DEFAULT_DATE,
    ) -> None:
        """tokens: the special tokens' texts, by the names in templates (`bos_token`, `eos_token`).

        date: the day that a template is told, YYYY-MM-DD. Raises UserError when the template cannot
        write a prompt.
        """
        self.source, self.name, self.own, self._tokens = source, name, own, tokens
        self.as_they_stand, self.begun_otherwise, self.doubled = Counted(), Counted(), Counted()
        self.changed_questions, self.other_prompts = Counted(), Counted()
        self.left_out = Counted()
        self._template = self._bounded(lambda: _environment(date).from_string(source))
        # Two renderings of a sample tell where the template puts the answer, and what follows it.
        prompt = self._render([_user(_QUESTION)], generate=True)
        if _QUESTION not in prompt:
            raise UserError(
                f"{name}: writes {prompt!r} for a user's {_QUESTION!r}, without the text; "
                "correct the template"
            )
        self._prompt, self._stem, self._header = prompt, prompt, ""
        self._thought = Thought.at_end(prompt)
        self.sample, self.ending, self._before = prompt, "", ""
        self._no_answers = self._look_at_answers(prompt)

    def _look_at_answers(self, prompt: str) -> str | None:
        """Find out how answers are written; why none can be, if so: to generate needs none."""
        try:
            self.sample = sample = self._render([_user(_QUESTION), _assistant(_ANSWER)])
        except UserError as error:
            return str(error)
        # A prompt may open a thought, such as <think>, where an answer without one goes on
        # otherwise: what both begin with is the stem.
        if self._thought and self._thought.is_open and not sample.startswith(prompt):
            common = len(os.path.commonprefix((prompt, sample)))
            self._stem = prompt[: min(common, self._thought.start)]
        rest = sample[len(self._stem) :]
        if not sample.startswith(self._stem) or _QUESTION in rest:
            return (
                f"{self.name}: the whole conversation {sample!r} does not begin with the prompt "
                f"{prompt!r} for generation; trained answers would follow another prompt than "
                "generated ones: correct the template"
            )
        if rest.count(_ANSWER) != 1:
            count = rest.count(_ANSWER)
            return (
                f"{self.name}: writes the answer {count} times after the prompt {prompt!r}; "
                "it must be there once"
            )
        self._before, self.ending = rest.split(_ANSWER)
        # A template that knows no generation prompt writes the answer's header with the answer: it
        # belongs to the prompt. Not the space at its end, which tokenizers make one with the
        # answer's first word, nor an empty thought.
        if prompt == self._render([_user(_QUESTION)]):
            header = self._before.rstrip(" ")
            thought = Thought.at_end(header)
            self._header = header[: thought.start] if thought else header
            self._before = self._before[len(self._header) :]
            self._prompt = self._stem = prompt + self._header
        return None

    @property
    def counted(self) -> dict[str, Counted]:
        """All that is counted, by its name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Counted)}

    @property
    def closing(self) -> str:
        """What the template writes between a first question and where its answer is to begin."""
        return self._prompt.rpartition(_QUESTION)[2]

    @cached_property
    def opening(self) -> str:
        """What the template writes to open an answer, whatever comes before; "" where nothing."""
        closed = self._render([_user(_QUESTION)])
        if self._header or not self._prompt.startswith(closed):
            return self._header
        return self._prompt[len(closed) :]

    @property
    def around_question(self) -> str:
        """What the template writes of a question up to its answer, but for what opens that."""
        return self._prompt[: self._thought.start] if self._thought else self._prompt

    @property
    def structure(self) -> str:
        """What sets turns apart, in a line each: what begins all, and what surrounds questions.

        Without a system's text, which may mention any token, and without marks of reasoning.
        """
        before, _, after = self.around_question.rpartition(_QUESTION)
        begin = before.lstrip().split(maxsplit=1)[0] if before.strip() else ""
        # The first answer's end and the next question's beginning: some templates write a system's
        # text before the last question.
        turns = [_user(_QUESTION), _assistant(_ANSWER)]
        try:
            text = self._render([*turns, *turns, _user("And")])
        except UserError:  # it writes one question only
            text = ""
        between = text.partition(_ANSWER)[2].partition(_QUESTION)[0] if _ANSWER in text else before
        return _MARK.sub("", "\n".join((begin, between, after)))

    def prompt(self, question: Question) -> str:
        """The user's turn, up to where the answer is to begin.

        question: the turn's text, or a conversation up to it.
        """
        messages = Messages([_user(question)]) if isinstance(question, str) else question
        text = self.before_answer(messages, messages.tools)
        asked = messages[-1].get("content") or ""
        if asked.strip() not in text and messages[-1]["role"] == "user":
            self.changed_questions.add(asked)
        if not self._header and _ends_of(Thought.at_end(text)) != _ends_of(self._thought):
            self.other_prompts.add(asked[-80:])  # whose end it goes by
        return text

    def response(self, answer: str, sampled: bool = False, is_cut: bool = False) -> str:
        """What follows the prompt, but for `ending`: the answer, and what stands before it.

        That is the template's conversation wherever it begins with the prompt and holds the whole
        answer. Nothing of an answer is lost: where the template leaves a part out, or writes
        another, the answer stands as it is between what surrounds others. Raises UserError for one
        that does not go on from the prompt, unless it was sampled: whatever that is, it did.
        is_cut: whether it has no end, so that it may be reasoning that would have been closed.
        """
        if self._no_answers is not None:
            raise UserError(self._no_answers)
        thought = self._thought
        if is_cut and thought and thought.is_open and thought.closing not in answer:
            return self._in_thought(answer)
        text = self._render([_user(_QUESTION), _assistant(answer)])
        start = self._prompt if text.startswith(self._prompt) else self._stem
        middle = text[len(start) : len(text) - len(self.ending)]
        rest = thought.not_again(answer) if thought else answer
        is_whole = text == start + middle + self.ending and (
            is_held(answer, middle) or is_held(rest, middle)
        )
        if is_whole and start == self._prompt:
            if _has_empty_first(self._prompt[len(self.around_question) :] + middle):
                self.doubled.add(answer)
            return middle
        written = self._after_prompt(answer, middle if is_whole else answer, sampled)
        (self.begun_otherwise if is_whole else self.as_they_stand).add(answer)
        return written

    def notes(self) -> list[str]:
        """What a user should know of the questions and answers so far, a sentence of each kind."""
        told = (
            (
                self.left_out,
                "leaves out parts of {0.count} turns of conversations, such as of {0.first!r} "
                "(often earlier reasoning): they are trained on as it writes them",
            ),
            (
                self.as_they_stand,
                "leaves out or changes parts of {0.count} answers, such as {0.first!r}; these are "
                "trained on as they stand, between what the template writes around an answer",
            ),
            (
                self.begun_otherwise,
                "begins {0.count} answers, such as {0.first!r}, otherwise than its prompt for "
                "generation ends; these are trained on after that prompt",
            ),
            (
                self.changed_questions,
                "leaves out or changes parts of {0.count} questions, such as {0.first!r}: the "
                "model reads them as the template writes them",
            ),
            (
                self.other_prompts,
                "ends {0.count} prompts, such as that of {0.first!r}, with another thought than "
                "others, or none: answers are written as after the others; keep such questions in "
                "files of their own",
            ),
            (
                self.doubled,
                "writes an empty thought before the reasoning of {0.count} answers, such as "
                "{0.first!r}, which it does not tell from an answer; close the reasoning, or "
                "correct the template",
            ),
        )
        return [f"{self.name}: {text.format(kind)}" for kind, text in told if kind.count]

    def _after_prompt(self, answer: str, text: str, sampled: bool) -> str:
        """`text`, which holds the answer, as it goes on after the prompt, whatever that opened."""
        thought = self._thought
        if thought is None:
            empty = Thought.at_end(self._before)  # which no reasoning goes on after
            return self._before[: empty.start if empty and empty.is_in(text) else None] + text
        rest = self._in_thought(text)
        if not thought.is_in(rest if not thought.is_open else answer):
            if self._stem == self._prompt:  # what stands before an answer without reasoning
                return self._before + rest
            if not answer.strip():
                return ""
            if sampled:
                return rest
            raise UserError(
                f"{self.name}: its prompt ends with {self._prompt[thought.start :]!r}, and the "
                f"answer {answer[:80]!r} neither begins so nor holds {thought.closing}: what would "
                "be trained follows no such beginning; put the reasoning into the outputs, or take "
                "a template whose prompt opens none"
            )
        if not thought.is_open and not sampled:
            raise UserError(
                f"{self.name}: its prompt ends with {self._prompt[thought.start :]!r}, after which "
                f"no reasoning comes, and the answer {answer[:80]!r} holds some; leave it out of "
                "the outputs, or take a template whose prompt leaves room for it"
            )
        return rest

    def _in_thought(self, text: str) -> str:
        """A text without what the prompt's end has of it."""
        assert self._thought is not None
        rest = self._thought.not_again(text)
        goes_on = self._prompt.endswith("\n") and rest != text
        return rest.removeprefix("\n") if goes_on else rest

    def marked(
        self, messages: list[Message], tools: list[dict] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The template's text of a whole conversation, and where what it marks as generated lies.

        tools: what the model may call, as JSON schemas. Raises UserError where the template fails.
        """
        if any(mark in json.dumps(messages, ensure_ascii=False) for mark in (GENERATED, ENDED)):
            raise UserError("holds U+FDD2 or U+FDD3, which are no characters; take them out")
        marks = {"_generated": GENERATED, "_ended": ENDED}
        parts = re.split(f"([{GENERATED}{ENDED}])", self._render(messages, False, tools, marks))
        text, starts, spans = "", list[int](), list[tuple[int, int]]()
        for part in parts:
            if part == GENERATED:
                starts.append(len(text))
            elif part == ENDED:
                spans.append((starts.pop(), len(text)))
            else:
                text += part
        return text, spans

    def text_of(self, messages: list[Message], tools: list[dict] | None = None) -> str:
        """The template's text of a whole conversation."""
        return self._render(messages, False, tools)

    def before_answer(self, messages: list[Message], tools: list[dict] | None = None) -> str:
        """The template's text of a conversation, up to where an answer to it is to begin."""
        return self._render(messages, True, tools) + self._header

    def _render(
        self,
        messages: list[Message],
        generate: bool = False,
        tools: list[dict] | None = None,
        marks: Mapping[str, str] | None = None,
    ) -> str:
        size = sum(len(str(message)) for message in messages) + len(str(tools))
        messages = [_as_read(message) for message in messages]

        def write() -> str:
            # part by part, so that a template without end is stopped before memory is full
            parts, length = [], 0
            for part in self._template.generate(
                messages=messages,
                add_generation_prompt=generate,
                tools=tools,
                documents=None,
                **self._tokens,
                **(marks or {}),
            ):
                parts.append(part)
                length += len(part)
                if length > LONGEST + size:
                    raise SecurityError(f"writes more than {LONGEST:,} characters")
            return "".join(parts)

        return self._bounded(write)

    def bounded(self, work: Callable[[], T]) -> T:
        """What `work` gives, which renders several times within one limit of time.

        Raises UserError where that is over, and what `work` itself raises.
        """
        return self._bounded(work, (UserError,))

    def _bounded(self, work: Callable[[], T], raised: tuple[type[Exception], ...] = ()) -> T:
        """What `work` gives. UserError when it fails, or takes more than SECONDS.

        raised: errors of work's own, which are raised as they are.
        """
        if _within_limit.is_on:
            return self._outcome_of(work, raised)
        outcome: dict[str, Any] = {}

        def run() -> None:
            _within_limit.is_on = True
            try:
                outcome["value"] = self._outcome_of(work, raised)
            except UserError as error:
                outcome["error"] = error

        # A thread that never ends is left behind: the refusal ends the process, and it with that.
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(SECONDS)
        if "value" in outcome:
            return outcome["value"]
        if "error" in outcome:
            raise outcome["error"]
        raise UserError(
            f"{self.name}: the chat template takes more than {SECONDS} seconds for one answer; "
            "correct it"
        )

    def _outcome_of(self, work: Callable[[], T], raised: tuple[type[Exception], ...]) -> T:
        """What `work` gives. Raises UserError for whatever a template's expressions raise."""
        try:
            return work()
        except raised:
            raise
        except Exception as problem:
            error = problem
        error_type = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        number = getattr(error, "lineno", None)
        line = f" (line {number})" if number else ""
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"{self.name}: the chat template fails{line}: {error_type}{reason}")


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _as_read(message: Message) -> Message:
    """A message as templates get it in transformers: no keys that say nothing, reasoning twice."""
    said = {key: value for key, value in message.items() if value is not None}
    thought = next((said[name] for name in REASONING if name in said), None)
    if thought is None:
        return said
    return {"thinking": thought, **said, "reasoning_content": thought}


def _dense(text: str) -> str:
    return "".join(text.split())


def is_held(answer: str, text: str) -> bool:
    """Whether a text holds an answer.

    White space at the ends of the answer and of its reasoning is the template's own affair.
    """
    place = 0
    for part in map(str.strip, _MARK.split(answer)):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return _dense(answer) in _dense(text)  # with its marks


def _ends_of(thought: Thought | None) -> tuple[str, bool] | None:
    return None if thought is None else (thought.opening, thought.is_open)


def _has_empty_first(text: str) -> bool:
    """Whether a text begins with an empty thought and another thought after it."""
    mark = _OPENING.match(text.lstrip())
    return mark is not None and _dense(text).startswith(mark[0] + _closing(mark[0]) + mark[0])


def has_template(folders: list[Path]) -> bool:
    """Whether a chat template of its own lies in one of the folders."""
    return any(
        (folder / "chat_template.jinja").is_file()
        or (folder / "tokenizer_config.json").is_file()
        and read_json(folder / "tokenizer_config.json").get("chat_template") is not None
        for folder in folders
    )


def find_chat(
    folders: list[Path],
    family: str,
    tokens: dict[str, str],
    control: Container[str] = (),
    has_prefix: bool = True,
    date: str = DEFAULT_DATE,
) -> Chat:
    """The template that lies in the first of the folders that has one, else the family's.

    family: a name that begins as one in TEMPLATES, such as "qwen2" or "llama-2-7b"; control: the
    tokenizer's special tokens, which tell generations of a family apart; has_prefix: whether it
    puts a space before a text. Raises UserError when there is none.
    """
    for folder in folders:
        path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if path.is_file():
            try:
                return Chat(path.read_text(encoding="utf-8"), str(path), tokens, date=date)
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        template = read_json(config).get("chat_template") if config.is_file() else None
        if template is not None:
            return Chat(_default(template, config), str(config), tokens, date=date)
    if family == "llama" and "<|start_header_id|>" in control:
        family = "llama-3"
    if family.startswith(("mistral", "mixtral")) and "[INST]" in control:
        family = "mistral " + ("[SYSTEM_PROMPT]" if "[SYSTEM_PROMPT]" in control else "[INST]")
    known = max((name for name in TEMPLATES if family.startswith(name)), key=len, default=None)
    if known is None:
        raise UserError(
            f"{folders[0]}: has no chat template, and {family} models share none; "
            "put one there as chat_template.jinja, or go without --use_chat_template"
        )
    template = TEMPLATES[known]
    if known.endswith("]") and not has_prefix:  # where spaces are bytes like others
        template = template.replace("] {", "]{").replace("(' ' + m.content)", "m.content")
    return Chat(template, f"the chat template of {known}", tokens, False, date)


def _default(template: Any, config: Path) -> str:
    """The template of `tokenizer_config.json`: a text, or the one called "default" of a list."""
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        templates = {str(entry.get("name")): entry.get("template") for entry in template}
        if "default" not in templates:
            raise UserError(
                f"{config}: its chat templates are {list(templates)}, "
                'none is called "default"; name one so'
            )
        template = templates["default"]
    if not isinstance(template, str):
        raise UserError(
            f"{config}: chat_template holds a {type(template).__name__}, a text is expected"
        )
    return template


def _environment(date: str) -> ImmutableSandboxedEnvironment:
    """Jinja as `transformers` sets it up for templates, on the given day.

    It is sandboxed, so that a template can compute text and nothing else.
    """
    day = datetime.fromisoformat(date)
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = day.strftime
    return environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses products too large to be computed.

    Nothing interrupts one, so that they would escape the limit of time.
    """

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > LONGEST:
            raise SecurityError(f"computes {operator} of too large values")
        return left * right


class _Generation(Extension):
    """`{% generation %}` puts marks around what a model writes, where a rendering has some."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.Name(mark, "load")]).set_lineno(line)
            for mark in ("_generated", "_ended")
        )
        return [begin, nodes.Scope(body).set_lineno(line), end]


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    # Jinja's `tojson` escapes HTML, which is no part of a chat's text.
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _raise(message: str) -> None:
    raise TemplateError(message)
