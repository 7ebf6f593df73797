r"""Builds the data sets that the trainers read.

    python dataset/build.py arithmetic --save_dir data/arithmetic
    python dataset/build.py gsm8k --source openai/gsm8k --save_dir data/gsm8k
    python dataset/build.py pairs --train_file data/gsm8k/train.json \
        --predictions predictions.jsonl --save_file data/gsm8k/verifier_train.json

`arithmetic` needs nothing. `gsm8k` takes a folder with the official train.jsonl and test.jsonl, or
the name of a hub data set. Both write train.json and test.json (`instruction`, `output`, `label`)
and verifier_train.json and verifier_test.json (`instruction`, `chosen`, `rejected`), where a
rejected answer is the gold one with a slip in it. `pairs` makes better verifier data from graded
samples of a solver, which `gsm8k --negatives solver` does in one go.

    python dataset/build.py pretrain --source texts/,more.jsonl --ckpt_dir CKPT --save_dir shards

`pretrain` makes texts shards of token ids, for pretrain.py and ppo_train.py --ptx_file. Killed, it
goes on when the same command is run again, and the shards are the same.

The others make train and test rows of well-known public data sets, from their files in any format
that the trainers read, or from the hub; each says what it leaves out, and why:

    python dataset/build.py hh --source 'hh-rlhf/*/train.jsonl.gz' \
        --test_source 'hh-rlhf/*/test.jsonl.gz' --save_dir data/hh
    python dataset/build.py no_robots --source HuggingFaceH4/no_robots@train \
        --test_source HuggingFaceH4/no_robots@test --save_dir data/no_robots
    python dataset/build.py ultrafeedback --source UltraFeedback --save_dir data/ultrafeedback
    python dataset/build.py stackexchange --source 'stack-exchange/**/*.parquet' --save_dir data/se
    python dataset/build.py math --source MATH --save_dir data/math
"""

import random
import sys
from pathlib import Path
from typing import Annotated, Literal

# Run as a script, the repository's root is not on the path, from which src and dataset import; this
# folder is, and goes behind Python's own modules, one of which has the name of inspect.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.sort(key=lambda path: Path(path).resolve() == Path(__file__).resolve().parent)

from tqdm import tqdm

from dataset.arithmetic import generate
from dataset.builders.hh import hh
from dataset.builders.math import competition_math
from dataset.builders.no_robots import no_robots
from dataset.builders.stackexchange import stackexchange
from dataset.builders.ultrafeedback import ultrafeedback
from dataset.corrupt import corrupt
from src.cli import run
from src.data.documents import sources_of
from src.data.rows import (
    INDEX,
    INSTRUCTION,
    SAMPLE,
    TEXT,
    is_truncated,
    read_rows,
    read_solver_rows,
    write_json,
)
from src.data.tokenization import Texts, tokenize
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.evaluation.gsm8k import extract
from src.evaluation.task import Task
from src.evaluation.tasks import TASKS, find_task
from src.settings.declaration import ROWS, WRITTEN, AtLeast, Between
from src.settings.model import SpecialTokens, unescaped

Seed = Annotated[int, "of everything random"]
MaxPerSide = Annotated[int, AtLeast(1), "right and wrong samples of a prompt, at most"]
GoldWhenNoneRight = Annotated[
    bool, "where no sample of a prompt is right, choose its gold output; else leave the prompt out"
]


def gsm8k(
    source: Annotated[str, "a folder with train.jsonl and test.jsonl, or a hub data set's name"],
    save_dir: Annotated[str, WRITTEN, "the folder to write"],
    negatives: Annotated[
        Literal["corrupt", "solver"],
        "a slip in the gold answer, or graded samples of the train rows in --predictions (see "
        "`pairs`; the test pairs are corrupted ones either way)",
    ] = "corrupt",
    predictions: Annotated[str | None, "a solver's samples of the train rows"] = None,
    seed: Seed = 0,
    hub_config: Annotated[str, "of the hub's data set"] = "main",
    max_per_side: MaxPerSide = 2,
    gold_when_none_right: GoldWhenNoneRight = True,
) -> None:
    """GSM8K from a folder with train.jsonl and test.jsonl, or from the hub."""
    if (negatives == "solver") != bool(predictions):
        raise UserError(
            f"--negatives {negatives} with --predictions {predictions}: solver negatives need a "
            "predictions file, and corrupt ones take none"
        )
    rows = {part: _gsm8k_rows(source, part, hub_config) for part in ("train", "test")}
    verifier = {part: _corrupted(rows[part], seed) for part in rows}
    if predictions is not None:
        verifier["train"], counts = pairs_of(
            rows["train"], predictions, max_per_side, gold_when_none_right
        )
        print(f"samples: {counts}")
    _write(save_dir, rows, verifier)


def arithmetic(
    save_dir: Annotated[str, WRITTEN, "the folder to write"],
    n_train: Annotated[int, AtLeast(1), "rows to train on"] = 20_000,
    n_test: Annotated[int, AtLeast(1), "rows to measure on"] = 600,
    seed: Seed = 0,
    terse_share: Annotated[
        float, Between(0, 1), "share of the train outputs that are terse, not worked"
    ] = 0.5,
    max_steps: Annotated[int, Between(1, 3), "of a train problem; test problems have 1 to 3"] = 3,
) -> None:
    """Word problems from templates, in GSM8K's format: train outputs worked or terse.

    Test outputs are worked.
    """
    rows = {
        "train": generate(n_train, seed, "train", terse_share, max_steps),
        "test": generate(n_test, seed, "test", 0.0),
    }
    _write(save_dir, rows, {part: _corrupted(rows[part], seed) for part in rows})


def pairs(
    train_file: Annotated[str, ROWS, "the rows that were sampled"],
    predictions: Annotated[
        str, 'samples, `{"index": row of train_file from 0, "output": sample}`, any number of each'
    ],
    save_file: Annotated[str, WRITTEN, "the .json file to write"],
    max_per_side: MaxPerSide = 2,
    gold_when_none_right: GoldWhenNoneRight = True,
    task: Annotated[str, "whose rule says what is right: GSM8K or MATH"] = "GSM8K",
    rule: Annotated[
        str | None, "which of its rules, such as numeric; the task's first when not given"
    ] = None,
) -> None:
    """Verifier rows from a solver's samples: right ones against wrong ones, by a task's rule."""
    if Path(save_file).resolve() in (Path(train_file).resolve(), Path(predictions).resolve()):
        raise UserError(
            f"--save_file {save_file}: is read and would be overwritten; write to another file"
        )
    if Path(save_file).suffix != ".json":
        raise UserError(f"--save_file {save_file}: a .json file is written; name it so")
    train_rows = read_solver_rows(train_file)
    for note in train_rows.notes:
        print(note)
    rows, counts = pairs_of(
        train_rows,
        predictions,
        max_per_side,
        gold_when_none_right,
        find_task(task, rule),
    )
    write_json(save_file, rows)
    print(f"{save_file}: {len(rows)} rows; {counts}")


def pretrain(
    source: Annotated[
        str,
        "texts: .txt files, rows in any format, folders, patterns, URLs, data sets, with commas "
        "between (docs/data.md)",
    ],
    save_dir: Annotated[str, WRITTEN, "the folder of shards to write"],
    tokenizer_file: Annotated[str | None, "the tokenizer; or give --ckpt_dir"] = None,
    ckpt_dir: Annotated[str | None, "the model whose tokenizer is taken"] = None,
    text_field: Annotated[str, "the field that holds a row's text"] = "text",
    document_separator: Annotated[
        str | None,
        "what sets the documents of a .txt apart, such as \\n\\n; a file is one when not given",
    ] = None,
    special_tokens: SpecialTokens = "control",
    shard_tokens: Annotated[
        int, AtLeast(1, 10**12), "a shard ends with the document that reaches so many tokens"
    ] = 10**8,
) -> None:
    """Texts as shards of token ids, by all cores."""
    if (tokenizer_file is None) == (ckpt_dir is None):
        raise UserError("give --tokenizer_file or --ckpt_dir: one of the two")
    tokenizer = Tokenizer.find(Path(ckpt_dir or "."), tokenizer_file, special_tokens=special_tokens)
    separator = unescaped(document_separator)
    if separator == "":
        raise UserError("--document_separator: is empty; leave it out, or give a text")
    texts = Texts(sources_of(source), text_field, separator, shard_tokens)
    with tqdm(unit="char", unit_scale=True, desc="tokenized", mininterval=1) as bar:
        index = tokenize(texts, tokenizer, save_dir, bar.update)
    for note in tokenizer.notes():
        print(note)
    if index["empty"]:
        print(f"{index['empty']:,} documents are empty, and left out")
    print(
        f"{save_dir}: {index['tokens']:,} tokens in {index['documents']:,} documents, "
        f"{len(index['shards'])} shards of {index['dtype']}"
    )


def pairs_of(
    rows: list[dict],
    predictions: str,
    max_per_side: int,
    gold_when_none_right: bool,
    task: Task = TASKS["GSM8K"],
) -> tuple[list[dict], str]:
    """(verifier rows, what became of the samples).

    A prompt needs a wrong sample, and a right one or its gold. task: by whose metric.
    """
    samples: dict[int, list[str]] = {}
    unusable = cut = 0
    for sample in read_rows(predictions, {"index": INDEX, "output": SAMPLE}):
        if sample["index"] >= len(rows):
            raise UserError(
                f"{predictions}: index {sample['index']} in a train file of {len(rows)} rows "
                "(counted from 0): these are predictions for another file"
            )
        if TEXT.accepts(sample["output"]):
            samples.setdefault(sample["index"], []).append(sample["output"])
            cut += bool(is_truncated(sample))
        else:  # wrong, but nothing that a verifier could read
            unusable += 1
    built, none_wrong, none_right = [], 0, 0
    for index, texts in sorted(samples.items()):
        row = rows[index]
        try:
            gold = task.gold_of(row)
            task.check_gold(task.metric, gold)
        except UserError as error:
            raise UserError(f"row {index} (from 0) of the train file: {error}") from None
        sides: dict[bool, list[str]] = {True: [], False: []}
        for text in dict.fromkeys(texts):
            sides[task.is_right(task.read(text), gold)].append(text)
        none_wrong += not sides[False]
        none_right += not sides[True]
        if not sides[True] and gold_when_none_right:
            sides[True] = row["outputs"]
        if sides[True] and sides[False]:
            built.append(
                {
                    "instruction": row["instruction"],
                    "chosen": sides[True][:max_per_side],
                    "rejected": sides[False][:max_per_side],
                }
            )
    counts = (
        f"{sum(map(len, samples.values()))} samples of {len(samples)} prompts, {none_wrong} "
        f"prompts without a wrong one (skipped), {none_right} without a right one "
        f"({'gold chosen' if gold_when_none_right else 'skipped'})"
    )
    if unusable:
        counts += f", {unusable} samples blank or with a NUL (left out)"
    if cut:
        counts += f", {cut} samples cut at their token limit (taken as they are)"
    if not built:
        raise UserError(
            f"{predictions}: no prompt gives a pair: {counts}; sample more often or at a higher "
            "temperature"
        )
    return built, counts


def _gsm8k_rows(source: str, part: str, hub_config: str) -> list[dict]:
    folder = Path(source)
    if folder.exists():
        part_rows = read_rows(
            folder / f"{part}.jsonl", {"question": TEXT, "answer": TEXT}, {INSTRUCTION: TEXT}
        )
        for note in part_rows.notes:
            print(note)
        official: list[dict] = part_rows
    else:
        official = _hub_rows(source, part, hub_config)
    rows = []
    for number, row in enumerate(official):
        label = extract("official", row["answer"])
        if label is None:
            raise UserError(
                f"{source}: {part} row {number} (from 0) has no '#### N' in its answer "
                f"{row['answer'][-60:]!r}; this is not GSM8K's format"
            )
        rows.append(
            {
                "instruction": row["question"],
                "output": row["answer"],
                "outputs": [row["answer"]],
                "label": label,
            }
        )
    return rows


def _hub_rows(source: str, part: str, hub_config: str) -> list[dict]:
    try:
        from datasets import load_dataset  # only this route needs it
    except ImportError as error:
        raise UserError(
            f"--source {source}: no such folder, and reading a hub data set needs the datasets "
            "library: pip install datasets, or name a folder with train.jsonl and test.jsonl"
        ) from error
    try:
        rows = list(load_dataset(source, hub_config, split=part))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--source {source}: no such folder, and the hub gave no split {part!r} of it with "
            f"--hub_config {hub_config}: {error}"
        ) from error
    if not rows or not {"question", "answer"} <= set(rows[0]):
        raise UserError(
            f"--source {source}: its {part} rows have {sorted(rows[0]) if rows else 'no'} columns; "
            "expected question and answer"
        )
    return rows


def _corrupted(rows: list[dict], seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "instruction": row["instruction"],
            "chosen": row["output"],
            "rejected": corrupt(row["output"], rng),
        }
        for row in rows
    ]


def _write(save_dir: str, rows: dict[str, list[dict]], verifier: dict[str, list[dict]]) -> None:
    for part in rows:
        kept = [
            {field: row[field] for field in ("instruction", "output", "label")}
            for row in rows[part]
        ]
        for name, content in ((f"{part}.json", kept), (f"verifier_{part}.json", verifier[part])):
            write_json(Path(save_dir) / name, content)
            print(f"{Path(save_dir) / name}: {len(content)} rows")


if __name__ == "__main__":
    run(
        {
            "gsm8k": gsm8k,
            "arithmetic": arithmetic,
            "pairs": pairs,
            "pretrain": pretrain,
            "hh": hh,
            "stackexchange": stackexchange,
            "ultrafeedback": ultrafeedback,
            "no_robots": no_robots,
            "math": competition_math,
        }
    )
