"""One user's turn and its answer, as a chat template writes them.

This is text only: `src.data.tokenizer` makes ids of it.
"""

import json
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from src.checkpoint.files import read_json
from src.errors import UserError

SECONDS = 10  # for one rendering, which takes a fraction of a millisecond
LONGEST = 10**7  # characters that a rendering may have

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
)
_MISTRAL = (  # its tokenizer puts a space before each text, which is the one before the answer
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

# For folders without a template, by the beginning of the family's name. Llama 1 has none.
TEMPLATES = {
    "llama-2": "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
    "llama-3": "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL,
    "qwen": _SYSTEM + _CHATML,
    "qwen2": _SYSTEM + _CHATML,
    "qwen3": _CHATML,
}

_QUESTION, _ANSWER = "What is it", "ThisIsTheAnswer"  # words that no template changes


class Chat:
    """How a template writes a question and its answer.

    `prompt(question) + response(answer) + ending` is the template's text of the two messages.
    `name`: where the template is from, for messages. `own`: whether it lies with the model.
    `sample`: such a text, with all that the template writes.
    """

    def __init__(self, source: str, name: str, tokens: dict[str, str], own: bool = True) -> None:
        """tokens: the special tokens' texts, by the names in templates (`bos_token`, `eos_token`).

        Raises UserError when the template fails, or writes answers in a way that cannot be told
        from the prompt.
        """
        self.source, self.name, self.own, self._tokens = source, name, own, tokens
        self._template = self._bounded(lambda: _environment().from_string(source))
        # Two renderings of a sample tell where the template puts the answer, and what follows it.
        prompt = self._render(_QUESTION, generate=True)
        self.sample = self._render(_QUESTION, _ANSWER)
        if _QUESTION not in prompt:
            raise UserError(
                f"{name}: writes {prompt!r} for a user's {_QUESTION!r}, without the text; "
                "correct the template"
            )
        if not self.sample.startswith(prompt):
            raise UserError(
                f"{name}: the whole conversation {self.sample!r} does not begin with the prompt "
                f"{prompt!r} for generation; trained answers would follow another prompt than "
                "generated ones: correct the template"
            )
        rest = self.sample[len(prompt) :]
        if rest.count(_ANSWER) != 1:
            count = rest.count(_ANSWER)
            raise UserError(
                f"{name}: writes the answer {count} times after the prompt {prompt!r}; "
                "it must be there once"
            )
        before, self.ending = rest.split(_ANSWER)
        # A template that knows no generation prompt writes the answer's header with the answer: it
        # belongs to the prompt. Not the space at its end, which tokenizers make one with the
        # answer's first word.
        self._header = before.rstrip(" ") if prompt == self._render(_QUESTION) else ""
        self._prompt = prompt + self._header

    def prompt(self, question: str) -> str:
        """The user's turn, up to where the answer is to begin."""
        return self._render(question, generate=True) + self._header

    def response(self, answer: str) -> str:
        """What follows the prompt, but for `ending`: the answer, and what stands before it."""
        text = self._render(_QUESTION, answer)
        middle = text[len(self._prompt) : len(text) - len(self.ending)]
        if text != self._prompt + middle + self.ending:
            raise UserError(
                f"{self.name}: writes the answer {answer[:80]!r} not between {self._prompt!r} and "
                f"{self.ending!r}, as it writes others; leave that row out or correct the template"
            )
        return middle

    def _render(self, question: str, answer: str | None = None, generate: bool = False) -> str:
        messages = [{"role": "user", "content": question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})

        def write() -> str:
            # part by part, so that a template without end is stopped before memory is full
            parts, length = [], 0
            for part in self._template.generate(
                messages=messages,
                add_generation_prompt=generate,
                tools=None,
                documents=None,
                **self._tokens,
            ):
                parts.append(part)
                length += len(part)
                if length > LONGEST + len(question) + len(answer or ""):
                    raise SecurityError(f"writes more than {LONGEST:,} characters")
            return "".join(parts)

        return self._bounded(write)

    def _bounded(self, work: Callable[[], Any]) -> Any:
        """What `work` gives. UserError when it fails, or takes more than SECONDS."""
        outcome: dict[str, Any] = {}

        def run() -> None:
            try:
                outcome["value"] = work()
            except Exception as error:  # a template can raise whatever its expressions do
                outcome["error"] = error

        # A thread that never ends is left behind: the refusal ends the process, and it with that.
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(SECONDS)
        if "value" in outcome:
            return outcome["value"]
        if "error" not in outcome:
            raise UserError(
                f"{self.name}: the chat template takes more than {SECONDS} seconds for one answer; "
                "correct it"
            )
        error = outcome["error"]
        error_type = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        line = f" (line {error.lineno})" if getattr(error, "lineno", None) else ""
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"{self.name}: the chat template fails{line}: {error_type}{reason}")


def find_chat(folders: list[Path], family: str, tokens: dict[str, str]) -> Chat:
    """The template that lies in the first of the folders that has one, else the family's.

    family: a name that begins as one in TEMPLATES, such as "qwen2" or "llama-2-7b". Raises
    UserError when there is none.
    """
    for folder in folders:
        path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if path.is_file():
            try:
                return Chat(path.read_text(encoding="utf-8"), str(path), tokens)
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        template = read_json(config).get("chat_template") if config.is_file() else None
        if template is not None:
            return Chat(_default(template, config), str(config), tokens)
    known = max((name for name in TEMPLATES if family.startswith(name)), key=len, default=None)
    if known is None:
        raise UserError(
            f"{folders[0]}: has no chat template, and {family} models share none; "
            "put one there as chat_template.jinja, or go without --use_chat_template"
        )
    return Chat(TEMPLATES[known], f"the chat template of {known}", tokens, own=False)


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


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as `transformers` sets it up for templates.

    It is sandboxed, so that a template can compute text and nothing else.
    """
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
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
    """`{% generation %}` marks what a model writes, for loss masks; it leaves the text as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True)
        ).set_lineno(line)


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    # Jinja's `tojson` escapes HTML, which is no part of a chat's text.
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _raise(message: str) -> None:
    raise TemplateError(message)
