"""What the stages said, as Markdown tables."""

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
NOT_MEASURED = "not measured"


def tables(records: list[Record]) -> str:
    """All tables, and how each stage ended. records: lines of results.jsonl, in their order."""
    by_stage: dict[str, list[Record]] = {}
    ends = []
    for record in records:
        if "ended" in record:
            ends.append(record)
        else:
            by_stage.setdefault(record["stage"], []).append(record)
    parts = [part for name, table in TABLES.items() if (part := table(by_stage.get(name, [])))]
    rows = [(end["stage"], end["ended"], f"{end['took']:.0f}") for end in ends]
    return "\n".join([*parts, table(("stage", "ended", "s"), rows)])


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(record: Record, key: str, form: str = ".2f") -> str:
    value = record.get(key)
    return NOT_MEASURED if value is None else format(value, form)


def phases(record: Record) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in record["phases"].items())


def environment(records: list[Record]) -> str:
    found: Record = {}
    for record in records:
        found |= record
    if not found:
        return ""
    memory = "" if found["memory_gb"] is None else f", {found['memory_gb']:.0f} GB"
    return (
        f"{found['device']}{memory}, torch {found['torch']}, Python {found['python']}, Triton "
        f"{found['triton']}. Copies at {number(found, 'copy_gb_per_s', '.0f')} GB/s, products at "
        f"{number(found, 'matmul_tflops', '.1f')} TFLOP/s.\n"
    )


def correctness(records: list[Record]) -> str:
    if not records:
        return ""
    by_outcome = {
        outcome: [record for record in records if record["outcome"] == outcome]
        for outcome in ("passed", "failed", "skipped")
    }
    counts = ", ".join(f"{len(found)} {outcome}" for outcome, found in by_outcome.items())
    failed = [f"- failed: {record['test']}\n" for record in by_outcome["failed"]]
    return f"tests/gpu: {counts}.\n{''.join(failed)}"


def decode(records: list[Record]) -> str:
    rows = [
        (
            f"batch {record['batch']}",
            number(record, "ms"),
            number(record, "tokens_per_s", ".0f"),
            number(record, "roofline"),
            number(record, "kernels", ".0f"),
            number(record, "busy_ms"),
        )
        for record in records
    ]
    head = ("decode step", "ms", "tokens/s", "of the memory roofline", "kernels", "device busy, ms")
    return rows and table(head, rows)


def rollouts(records: list[Record]) -> str:
    fixed = records[0]["tokens_per_s"] if records else None
    rows = [
        (
            record["rollouts"],
            str(record["tokens"]),
            number(record, "s"),
            number(record, "tokens_per_s", ".0f"),
            f"{fixed / record['tokens_per_s']:.2f}",
        )
        for record in records
    ]
    head = ("rollouts", "tokens", "s", "tokens/s", "time per token, of one length's")
    return rows and table(head, rows)


def training(records: list[Record]) -> str:
    rows = []
    for record in records:
        what = [f"{record['parameters'] / 1e9:.2f}B, {record['trained']}"]
        what += {"none": [], "selective": ["recomputed in part"], "full": ["recomputed"]}[
            record["recompute"]
        ]
        what += ["compiled"] * record["compiled"]
        label = f"{', '.join(what)}, {record['rows']} × {record['length']} tokens"
        if record.get("fits", True):
            numbers = [
                number(record, key, form)
                for key, form in (
                    ("s", ".3f"),
                    ("tokens_per_s", ".0f"),
                    ("mfu_of_measured", ".2f"),
                    ("mfu_of_published", ".2f"),
                    ("memory_gb", ".1f"),
                )
            ]
            rows.append((label, *numbers, phases(record)))
        else:
            rows.append((label, "does not fit", "", "", "", "", ""))
    head = ("step", "s", "tokens/s", "MFU", "of 989 TFLOP/s", "memory, GB", "phases, s")
    return rows and table(head, rows)


def scripts(records: list[Record]) -> str:
    rows = [
        (
            f"{record['iteration']}, {record['rollouts']} × {record['tokens']} tokens",
            number(record, "s", ".1f"),
            phases(record),
            number(record, "generated_per_s", ".0f"),
            number(record, "updated_per_s", ".0f"),
            number(record, "memory_gb", ".1f"),
        )
        for record in records
        if "iteration" in record
    ]
    head = ("iteration", "s", "phases, s", "generated/s", "updated/s", "memory, GB")
    return rows and table(head, rows)


def peers(records: list[Record]) -> str:
    rows = [
        (
            f"transformers.generate, batch {record['batch']}",
            number(record, "ms"),
            number(record, "tokens_per_s", ".0f"),
        )
        for record in records
        if "batch" in record
    ]
    rows += [
        (record["package"], NOT_MEASURED, "not installed here")
        for record in records
        if "package" in record and record["version"] is None
    ]
    return rows and table(("beside it", "ms a step", "tokens/s"), rows)


def kernels(records: list[Record]) -> str:
    return "\n".join(record["text"] for record in records if "text" in record)


TABLES: dict[str, Callable[[list[Record]], str]] = {
    "env": environment,
    "correct": correctness,
    "decode": decode,
    "rollouts": rollouts,
    "train": training,
    "lora": training,
    "scripts": scripts,
    "peers": peers,
    "kernels": kernels,
}
