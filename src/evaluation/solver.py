"""A solver's accuracy on a task: generate, grade, write `results.json` and `predictions.jsonl`."""

from pathlib import Path

from src.data.rows import write_json, write_jsonl
from src.data.tokenizer import Tokenizer
from src.evaluation.tasks import Task
from src.generation.engine import Engine, generate_sharded
from src.generation.sampling import Sampling
from src.logs import RunLog
from src.models.transformer import evaluating


def cut_at(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=len(text))]


def evaluate_solver(
    engine: Engine, tokenizer: Tokenizer, task: Task, instructions: list[str], golds: list[str], sampling: Sampling, log: RunLog
) -> tuple[dict, list[dict]]:
    """(summary, predictions): the task's accuracies by every rule on one set of generations, and a row per question."""
    prompts = [tokenizer.prompt_ids(text) for text in instructions]
    with evaluating(engine.model), log.progress(len(prompts), f"{task.name}", unit="answer") as bar:
        completions = generate_sharded(
            engine, prompts, sampling, tokenizer.stop_ids, on_tokens=lambda done, new: bar.update(done, tokens=new)
        )
    texts = [cut_at(tokenizer.decode(c.tokens), task.stop) for c in completions]
    return graded(task, instructions, golds, texts, [c.stop_reason == "length" for c in completions])


def graded(
    task: Task, instructions: list[str], golds: list[str], texts: list[str], truncated: list[bool] | None = None
) -> tuple[dict, list[dict]]:
    """The same for texts that are there already."""
    summary, rows = task.score(texts, golds, truncated)
    predictions = [
        {"index": i, "instruction": instruction, "output": text, "gold": gold, **row}
        for i, (instruction, text, gold, row) in enumerate(zip(instructions, texts, golds, rows))
    ]
    return {"task": task.name, "accuracy": summary[task.metric], **summary}, predictions


def write_results(log_dir: str, summary: dict, predictions: list[dict], settings: dict, suffix: str = "") -> None:
    """`results.json` and `predictions.jsonl` in log_dir; the suffix (an epoch) goes before the dot."""
    folder = Path(log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"results{suffix}.json", {**summary, "settings": settings})
    write_jsonl(folder / f"predictions{suffix}.jsonl", predictions)


def headline(summary: dict) -> str:
    """The summary in one line."""
    shares = ", ".join(f"{name} {100 * value:.1f} %" for name, value in summary.items() if isinstance(value, float))
    counts = ", ".join(f"{summary[name]} {name}" for name in ("unparsed", "truncated") if name in summary)
    return f"{summary['task']}, {summary['n']} problems: {shares}; {counts}"
