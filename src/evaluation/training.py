"""Evaluations inside a training run: before its first step and every so often after it, written beside the log."""

from collections.abc import Callable
from dataclasses import dataclass

from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.evaluation.solver import evaluate_solver, headline, write_results
from src.evaluation.verifier import evaluate_pairs
from src.generation.engine import Engine
from src.generation.sampling import Sampling
from src.inputs import Evaluation, comparisons, read_evaluation
from src.logs import RunLog
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.trainer.verifier import Comparison


def _both_or_none(task: str | None, label_file: str | None) -> bool:
    if (task is None) != (label_file is None):
        raise UserError(
            f"--task {task} --label_file {label_file}: evaluation needs both; give both or neither"
        )
    return task is not None


@dataclass(frozen=True)
class SolverEvaluation:
    """Accuracy on a task by greedy generation; does nothing when no task was given."""

    data: Evaluation | None
    batch_size: int
    max_new_tokens: int
    max_seq_len: int

    @classmethod
    def read(
        cls,
        task: str | None,
        label_file: str | None,
        batch_size: int,
        max_new_tokens: int,
        max_seq_len: int,
    ) -> "SolverEvaluation":
        data = read_evaluation(task, label_file) if _both_or_none(task, label_file) else None
        return cls(data, batch_size, max_new_tokens, max_seq_len)

    @property
    def metrics(self) -> tuple[str, ...]:
        return () if self.data is None else ("accuracy", *self.data.task.grade("", "0"))

    def run(
        self,
        at: str,
        number: int,
        model: Transformer,
        tokenizer: Tokenizer,
        parallel: Parallel,
        log: RunLog,
        settings: dict,
    ) -> dict[str, float]:
        """The metrics; `at`, such as "epoch 2", names the moment in the log and the files, `number` on the curves' axis."""
        if self.data is None:
            return {}
        engine = Engine(model, parallel, self.batch_size, self.max_seq_len)
        sampling = Sampling(max_new_tokens=self.max_new_tokens, temperature=0.0)
        data = self.data
        summary, predictions = evaluate_solver(
            engine, tokenizer, data.task, data.instructions, data.golds, sampling, log
        )
        log.info(f"after {at}: {headline(summary)}")
        metrics = {k: v for k, v in summary.items() if isinstance(v, float)}
        log.scalars(number, metrics, prefix=f"eval/{data.task.name}")
        if parallel.is_main:
            write_results(log.log_dir, summary, predictions, settings, f"-{at.replace(' ', '-')}")
        return metrics


@dataclass(frozen=True)
class VerifierEvaluation:
    """Accuracy on held-out pairs; does nothing when no label file was given."""

    task: str
    pairs: list[Comparison] | None
    warning: str | None
    batch_size: int

    @classmethod
    def read(
        cls,
        task: str | None,
        label_file: str | None,
        tokenizer: Tokenizer,
        batch_size: int,
        max_seq_len: int,
        strict: bool,
    ) -> "VerifierEvaluation":
        pairs, warning = (
            comparisons(label_file, tokenizer, max_seq_len, strict) if label_file else (None, None)
        )
        return cls(task or "pairs", pairs, warning, batch_size)

    @property
    def metrics(self) -> tuple[str, ...]:
        return () if self.pairs is None else ("accuracy", "margin")

    def run(
        self,
        at: str,
        number: int,
        model: Transformer,
        parallel: Parallel,
        log: RunLog,
        settings: dict,
    ) -> dict[str, float]:
        """The metrics; `at`, such as "epoch 2", names the moment in the log and the files, `number` on the curves' axis."""
        if self.pairs is None:
            return {}
        summary, rows = evaluate_pairs(model, parallel, self.pairs, self.batch_size, log)
        log.info(
            f"after {at}: {self.task}, pair accuracy {100 * summary['accuracy']:.1f} % on {summary['pairs']} pairs"
        )
        metrics = {name: summary[name] for name in self.metrics}
        log.scalars(number, metrics, prefix=f"eval/{self.task}")
        if parallel.is_main:
            write_results(log.log_dir, summary, rows, settings, f"-{at.replace(' ', '-')}")
        return metrics


class KeepBest:
    """Saves the model whenever a metric of its evaluations is higher than ever since training began."""

    def __init__(self, metric: str | None, save: Callable[[], None], log: RunLog) -> None:
        self.metric, self.save, self.log, self.best = metric, save, log, None

    @property
    def part(self) -> tuple[Callable, Callable]:
        """How to get and set what a saved run must keep of it."""
        return (lambda: self.best), (lambda best: setattr(self, "best", best))

    @staticmethod
    def check(metric: str | None, eval_every: int | None, known: tuple[str, ...]) -> None:
        """Raise UserError when the evaluation gives no such metric, or is not asked for. known: the metrics that it gives."""
        if eval_every is not None and not known:
            raise UserError(f"--eval_every {eval_every}: has no effect without --label_file")
        if metric is not None and metric not in known:
            gives = (
                f"gives {', '.join(known)}"
                if known
                else "is not asked for: give --label_file (and --task, of a solver)"
            )
            raise UserError(f"--keep_best {metric}: the evaluation {gives}")

    def consider(self, at: str, number: int, metrics: dict[str, float]) -> None:
        if self.metric is None or number == 0:  # nothing trained yet
            return
        if self.best is None or metrics[self.metric] > self.best:
            self.best = metrics[self.metric]
            self.save()
            self.log.info(f"{self.metric} {self.best:.4f} after {at}: the best so far, saved")
