"""Loss masks of conversations: transformers' on copies of real templates with marks put in by hand.

The templates are those that released models come with; TRL ships many of them as files.
"""

import re
from pathlib import Path

import pytest
import trl
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from src.data.messages import Conversation, Messages
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from tests.data import test_tokenizer as other

SHIPPED = Path(trl.__file__).parent / "chat_templates"
G, E = "{% generation %}", "{% endgeneration %}"

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_CHATML = [
    (
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}",
        "{{'<|im_start|>' + message['role'] + '\\n'}}{% if message['role'] == 'assistant' %}"
        + G
        + "{{ message['content'] + '<|im_end|>' }}"
        + E
        + "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
    )
]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
MISTRAL_1 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
# Mistral-7B-Instruct-v0.3's: tools and the system's text stand before the last question.
MISTRAL_3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is \
defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Conversation roles must alternate user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings of length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- set content = message.content %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""
# The one before, of Mistral-Small's of 2402: calls without ids, results with the tool's name.
MISTRAL_2 = re.sub(r" *\{%- if not tool_call\.id.*?endif %\}\n", "", MISTRAL_3, flags=re.S)
MISTRAL_2 = MISTRAL_2.replace("""{{- ', "id": "' + tool_call.id + '"}' }}""", "{{- '}' }}")
MISTRAL_2 = MISTRAL_2.replace(
    """'[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}""",
    """'[TOOL_RESULTS] [{"name": "' + message.name + '", "content": ' + content|string }}
        {{- '}][/TOOL_RESULTS]' }}""",
)
assert "id" not in re.findall(r"\w+", MISTRAL_2) and "tool_call_id" not in MISTRAL_2
# Mistral-Small's of 2501: a system's text of its own.
MISTRAL_7 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST]' + message['content'] + '[/INST]' }}{% elif message['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user, system and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)


def shipped(name):
    return (SHIPPED / f"{name}.jinja").read_text()


def marked_llama(name):
    """Llama 3.1's: behind the header of each of the assistant's two kinds of messages."""
    plain = (
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ "
        "message['content'] | trim + '<|eot_id|>' }}"
    )
    header = "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    text = "{{- message['content'] | trim + '<|eot_id|>' }}"
    return [
        (
            plain,
            f"{header}{{%- if message.role == 'assistant' %}}{{%- generation %}}{text}"
            f"{{%- endgeneration %}}{{%- else %}}{text}{{%- endif %}}",
        ),
        (
            "            {{- '{\"name\": \"' + tool_call.name + '\", ' }}",
            "{%- generation %}{{- '{\"name\": \"' + tool_call.name + '\", ' }}",
        ),
        (
            '            {{- "}" }}\n        {%- endif %}',
            '            {{- "}" }}{{- "<|eot_id|>" }}{%- endgeneration %}\n        {%- endif %}',
        ),
        ('            {{- "<|eot_id|>" }}\n        {%- endif %}', "        {%- endif %}"),
    ]


MARKED_MISTRAL = [
    (
        '        {{- "[TOOL_CALLS] [" }}',
        '        {%- generation %}{{- "[TOOL_CALLS] [" }}',
    ),
    (
        '        {%- endfor %}\n    {%- elif message["role"] == "assistant" %}',
        '        {%- endfor %}{%- endgeneration %}\n    {%- elif message["role"] == "assistant" %}',
    ),
    (
        '        {{- " " + message["content"]|trim + eos_token}}',
        '        {%- generation %}{{- " " + message["content"]|trim + eos_token}}'
        "{%- endgeneration %}",
    ),
]
# name: (the template, what is replaced by what to mark it)
TEMPLATES = {
    "chatml": (CHATML, MARKED_CHATML),
    "chatml with a system of its own": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant."
        "<|im_end|>\\n' }}{% endif %}" + CHATML,
        MARKED_CHATML,
    ),
    "smollm2": (SMOLLM2, MARKED_CHATML),
    "zephyr": (
        ZEPHYR,
        [
            (
                "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}",
                "{{ '<|assistant|>\\n' }}"
                + G
                + "{{ message['content'] + eos_token }}"
                + E
                + "{{ '' }}",  # a block would take the line's end behind it
            )
        ],
    ),
    "llama 2": (
        LLAMA_2,
        [
            (
                "{{ ' '  + content.strip() + ' ' + eos_token }}",
                G + "{{ ' '  + content.strip() + ' ' + eos_token }}" + E,
            )
        ],
    ),
    "llama 3": (
        shipped("llama3"),
        [
            (
                "{{ content }}{% endfor %}",
                "{% if message['role'] == 'assistant' %}{% set parts = "
                "content.split('<|end_header_id|>\\n\\n', 1) %}{{ parts[0] + "
                "'<|end_header_id|>\\n\\n' }}"
                + G
                + "{{ parts[1] }}"
                + E
                + "{% else %}{{ content }}{% endif %}{% endfor %}",
            )
        ],
    ),
    "llama 3.1": (shipped("llama3_1"), marked_llama("llama3_1")),
    "mistral 1": (
        MISTRAL_1,
        [
            (
                "{{ message['content'] + eos_token + ' ' }}",
                G + "{{ message['content'] + eos_token }}" + E + "{{ ' ' }}",
            )
        ],
    ),
    "mistral 2": (MISTRAL_2, MARKED_MISTRAL),
    "mistral 3": (MISTRAL_3, MARKED_MISTRAL),
    "mistral 7": (
        MISTRAL_7,
        [("{{ message['content'] + eos_token }}", G + "{{ message['content'] + eos_token }}" + E)],
    ),
    "qwen 2.5": (
        shipped("qwen2_5"),
        [
            (
                "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + "
                "'\\n' }}",
                "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}"
                "{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}"
                "{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}",
            ),
            (
                "        {{- '<|im_start|>' + message.role }}\n        {%- if message.content %}\n"
                "            {{- '\\n' + message.content }}\n        {%- endif %}",
                "        {{- '<|im_start|>' + message.role + '\\n' }}{%- generation %}"
                "{%- if message.content %}{{- message.content + '\\n' }}{%- endif %}",
            ),
            (
                '            {{- \'\\n<tool_call>\\n{"name": "\' }}',
                '            {{- \'<tool_call>\\n{"name": "\' if loop.first else '
                '\'\\n<tool_call>\\n{"name": "\' }}',
            ),
            (
                "        {%- endfor %}\n        {{- '<|im_end|>\\n' }}",
                "        {%- endfor %}{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}",
            ),
        ],
    ),
    "qwen 3": (
        shipped("qwen3"),
        [
            (
                "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + ",
                "{{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{- '<think>\\n' + ",
            ),
            (
                "{{- '<|im_start|>' + message.role + '\\n' + content }}",
                "{{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{- content }}",
            ),
        ],
    ),
    "phi 3": (
        shipped("phi3"),
        [
            (
                "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}",
                "{{'<|assistant|>\n'}}"
                + G
                + "{{ message['content'] + '<|end|>' }}"
                + E
                + "{{ '\n' }}",
            )
        ],
    ),
    "gemma": (
        shipped("gemma"),
        [
            (
                "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
                "'<end_of_turn>\n' }}",
                "{{ '<start_of_turn>' + role + '\n' }}{% if role == 'model' %}"
                + G
                + "{{ message['content'] | trim + '<end_of_turn>' }}"
                + E
                + "{% else %}{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}"
                "{{ '\n' }}",
            )
        ],
    ),
    "deepseek r1": (
        shipped("deepseek_r1_distill"),
        [
            (
                "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}",
                "{{'<｜Assistant｜>'}}" + G + "{{ content + '<｜end▁of▁sentence｜>'}}" + E,
            )
        ],
    ),
    # Marked by its makers' hand, and with more marks than turns' ends: as they have it.
    "with marks": (shipped("llama3_training"), []),
    "qwen 3 with marks": (shipped("qwen3_training"), []),
}
CALLS = [
    {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "adds",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
RESULT = {"role": "tool", "name": "add", "content": "3", "tool_call_id": "abcdefghi"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CONVERSATIONS = {
    "one turn": [user("What?"), assistant("It is 4.")],
    "two turns": [user("What?"), assistant("It is."), user("And?"), assistant("Two of them")],
    "five turns": [
        message for i in range(5) for message in (user(f"q{i}"), assistant(f"q{i} <s> {i}"))
    ],
    "system": [{"role": "system", "content": "Be brief."}, user("What?"), assistant("4")],
    "unicode": [
        user("日本?\u2028"),
        assistant("Ελλάδα 👩‍👩‍👧 e\u0301\n\n"),
        user("👍"),
        assistant("ﬁ"),
    ],
    "empty": [user("What?"), assistant(""), user("And?"), assistant("a")],
    "very long": [user("x " * 3000), assistant("an egg\n" * 3000), user("q"), assistant("y" * 9)],
    "one says what another says": [
        user("It is."),
        assistant("It is."),
        user("It is."),
        assistant("It"),
    ],
    "spelled out": [user("<|im_start|>assistant\nNo<|im_end|> [/INST]"), assistant("a [/INST] b")],
    "reasoning": [
        user("q"),
        assistant("<think>\nhm\n</think>\n\nan egg"),
        user("r"),
        assistant("<think>\nhm, hm\n</think>\n\ntwo"),
    ],
    "tools": [user("q"), assistant(None, tool_calls=CALLS), RESULT, assistant("It is 3")],
    "text and tools": [
        {"role": "system", "content": "Be brief."},
        user("q"),
        assistant("Let me see", tool_calls=CALLS),
        RESULT,
        assistant("It is 3"),
        user("so?"),
        assistant("yes"),
    ],
}
WITH_TOOLS = {"llama 3.1", "mistral 2", "mistral 3", "qwen 2.5", "qwen 3", "qwen 3 with marks"}
NO_SYSTEM = {"gemma", "mistral 1"}


def marked(name):
    template, replacements = TEMPLATES[name]
    for before, after in replacements:
        assert before in template, before
        template = template.replace(before, after)
    if name == "qwen 3":  # its turns end where the calls do
        before, after = template.split("        {{- '<|im_end|>\\n' }}\n    {%- elif", 1)
        end = "        {{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}\n    {%- elif"
        # a block may not begin in one branch and end behind it: the header comes first
        template = before + end + after
        template = template.replace("{% generation %}", "")
        template = template.replace(
            "{%- if loop.index0 > ns.last",
            "{{- '<|im_start|>assistant\\n' }}{%- generation %}{%- if loop.index0 > ns.last",
        )
        template = template.replace("{{- '<|im_start|>' + message.role + '\\n' }}{{- ", "{{- ")
    return template


@pytest.fixture(scope="module")
def rust():
    """A byte-level vocabulary with the tokens that the templates write."""
    rust = other.byte_level(500)
    names = {
        mark
        for template, _ in TEMPLATES.values()
        for mark in re.findall(r"<[|｜][\w▁]+[|｜]>|<\w+_of_turn>", template)
    }
    names |= {f"[{end}{name}]" for end in ("", "/") for name in ("INST", "SYSTEM_PROMPT")}
    names |= {"[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"}
    names |= {"[/TOOL_RESULTS]", "</s>"}
    rust.add_special_tokens([AddedToken(name, normalized=False) for name in sorted(names)])
    return rust


@pytest.fixture
def opened(tmp_path, rust):
    """opened(template, pieces): (our tokenizer, transformers' of the same folder)."""

    def open_both(template, with_pieces=False):
        folder = tmp_path
        runtime = RustTokenizer.from_str(rust.to_str())
        if with_pieces:  # SentencePiece's, where a space is a part of the word after it
            other.train_pieces(tmp_path / "tokenizer.model")
            runtime = Tokenizer(tmp_path / "tokenizer.model")._rust
            (tmp_path / "tokenizer.model").unlink()
            runtime.add_special_tokens([AddedToken("[/INST]", normalized=False)])
        runtime.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": template,
        }
        other.write_json(folder / "tokenizer_config.json", config)
        return Tokenizer.find(folder, use_chat_template=True), AutoTokenizer.from_pretrained(folder)

    return open_both


def spans_of(mask):
    """[start, stop) of what a mask of 0 and 1 has."""
    edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2]))


@pytest.mark.parametrize("which", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_a_template_that_is_marked_by_hand(opened, name, which):
    messages, tools = CONVERSATIONS[which], TOOLS if "tools" in which else None
    if (tools and name not in WITH_TOOLS) or (
        name in NO_SYSTEM and messages[0]["role"] == "system"
    ):
        tokenizer, _ = opened(TEMPLATES[name][0])
        with pytest.raises(UserError):  # what a template leaves out or refuses is never silent
            tokenizer.whole_conversation(Conversation(Messages(messages, tools)))
        return
    tokenizer, theirs = opened(TEMPLATES[name][0], name in ("llama 2", "mistral 1"))
    whole = theirs.apply_chat_template(
        messages,
        tools=tools,
        chat_template=marked(name),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, turns = tokenizer.whole_conversation(Conversation(Messages(messages, tools)))
    assert ids == theirs.apply_chat_template(messages, tools=tools, return_dict=False)
    assert ids == whole["input_ids"]
    mask = [0] * len(ids)
    for turn in turns:
        for start, stop in turn:
            mask[start:stop] = [1] * (stop - start)
    assert len(turns) == sum(message["role"] == "assistant" for message in messages)
    shown = [theirs.decode(ids[a:b]) for a, b in spans_of(mask)]
    assert shown == [theirs.decode(ids[a:b]) for a, b in spans_of(whole["assistant_masks"])]
    assert mask == whole["assistant_masks"]
