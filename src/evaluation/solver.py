"""A solver's accuracy on a task: generate, grade, write `results.json` and `predictions.jsonl`."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from pathlib import Path

import torch.distributed as dist

from src.data.messages import Question
from src.data.rows import write_json, write_jsonl
from src.data.tokenizer import Tokenizer
from src.evaluation.scoring import summarize
from src.evaluation.tasks import Task
from src.generation.engine import Engine, Stop
from src.generation.journal import Journal, generate_all
from src.generation.sampling import Sampling
from src.logs import RunLog
from src.parallel.setup import Parallel, agreed


def evaluate_solver(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    instructions: Collection[Question],
    golds: list[str],
    sampling: Sampling,
    log: RunLog,
    num_samples: int = 1,
    journal: Journal | None = None,
    stop_strings: tuple[str, ...] = (),
) -> tuple[dict, list[dict]]:
    """(summary, predictions): accuracies by each rule on one set of generations, a row per answer.

    With several samples of each question the accuracy is that of all of them, and pass@k and maj@n
    stand beside it. stop_strings: what ends a response beside the task's own.
    """
    prompts = [
        prompt for prompt in map(tokenizer.prompt_ids, instructions) for _ in range(num_samples)
    ]
    stop = Stop(tokenizer.stop_ids, (*task.stop, *stop_strings), tokenizer.decode)
    completions = generate_all(engine, prompts, sampling, stop, log, task.name, journal)
    texts = [tokenizer.decode(completion.tokens) for completion in completions]
    truncated = [completion.stop_reason == "length" for completion in completions]
    return graded(
        task, instructions, golds, texts, truncated, num_samples, stop_strings, engine.parallel
    )


def graded(
    task: Task,
    instructions: Collection[Question],
    golds: list[str],
    texts: list[str],
    truncated: list[bool] | None = None,
    num_samples: int = 1,
    stop_strings: tuple[str, ...] = (),
    parallel: Parallel | None = None,
) -> tuple[dict, list[dict]]:
    """`evaluate_solver` for texts that are there already, the samples of a question in a row.

    truncated: which of them the token limit cut, if that is known; what goes on with another
    question was not, since it is read to its own end. parallel: ranks that share the work.
    """
    golds = [gold for gold in golds for _ in range(num_samples)]
    instructions = [asked for asked in instructions for _ in range(num_samples)]
    answers = [task.read(text, stop_strings) for text in texts]
    if truncated is not None:
        truncated = [cut and len(text) == len(t) for cut, text, t in zip(truncated, texts, answers)]
    verdicts = _shared_out(lambda i: task.verdicts(answers[i], golds[i]), len(answers), parallel)
    summary, rows = summarize(verdicts, [task.answer_of(text) for text in answers], truncated)
    predictions = [
        {"index": i // num_samples, "instruction": instruction, "output": text, "gold": gold, **row}
        for i, (instruction, text, gold, row) in enumerate(zip(instructions, answers, golds, rows))
    ]
    for prediction, is_cut in zip(predictions, truncated or []):
        prediction["truncated"] = is_cut
    if num_samples > 1:
        votes = [task.taken(task.metric, text) for text in answers]
        summary |= of_samples(list(zip(votes, (row[task.metric] for row in rows))), num_samples)
    return {"task": task.name, "accuracy": summary[task.metric], **summary}, predictions


def _shared_out(
    verdicts_of: Callable[[int], dict[str, bool | None]], n: int, parallel: Parallel | None
) -> list[dict[str, bool | None]]:
    """The verdicts 0 … n − 1, of which each rank finds its share and gets all.

    So no two ranks can differ over a comparison that a limit cut off.
    """
    if parallel is None:
        return [verdicts_of(i) for i in range(n)]
    rank, size = parallel.rank, parallel.world_size
    own = agreed(lambda: [verdicts_of(i) for i in range(rank, n, size)])
    shares: list[list[dict[str, bool | None]]] = [[] for _ in range(size)]
    dist.all_gather_object(shares, own)
    return [shares[i % size][i // size] for i in range(n)]


def of_samples(answers: list[tuple[Hashable | None, bool]], n: int) -> dict[str, float]:
    """pass@k for k = 1, 2, 4 … n, and maj@n.

    answers: (the answer that the rule takes, right?) of n samples per question, in a row. pass@k
    is the unbiased estimate 1 − C(n − c, k) / C(n, k) for c right ones of n (arXiv 2107.03374,
    equation 1). maj@n is right when the answer that most samples give is (arXiv 2203.11171); the
    first given wins a tie, a sample without an answer has no vote.
    """
    questions = [answers[i : i + n] for i in range(0, len(answers), n)]
    right_counts = [sum(right for _, right in samples) for samples in questions]
    ks = sorted({n, *(2**e for e in range(n.bit_length()) if 2**e <= n)})
    result = {}
    for k in ks:
        passed = [1 - math.comb(n - count, k) / math.comb(n, k) for count in right_counts]
        result[f"pass@{k}"] = sum(passed) / len(passed)
    votes = [
        Counter(answer for answer, _ in samples if answer is not None).most_common(1)
        for samples in questions
    ]
    won = [
        bool(vote) and next(right for answer, right in samples if answer == vote[0][0])
        for vote, samples in zip(votes, questions)
    ]
    return {**result, f"maj@{n}": sum(won) / len(won)}


def write_results(
    log_dir: str, summary: dict, predictions: list[dict], settings: dict, suffix: str = ""
) -> None:
    """Write `results.json` and `predictions.jsonl`; the suffix (an epoch) goes before the dot."""
    folder = Path(log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"results{suffix}.json", {**summary, "settings": settings})
    write_jsonl(folder / f"predictions{suffix}.jsonl", predictions)


def headline(summary: dict) -> str:
    """The summary in one line."""
    shares = ", ".join(
        f"{name} {100 * value:.1f} %" for name, value in summary.items() if isinstance(value, float)
    )
    counts = ", ".join(
        f"{summary[name]} {name.replace('_', ' ')}"
        for name in ("unparsed", "truncated", "cut_off")
        if name in summary
    )
    return f"{summary['task']}, {summary['n']} problems: {shares}; {counts}"
