"""Evaluations inside a training run: before its first step and every so often after it.

Results are written beside the log.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from src.data.encoding import WRONG, Comparison, Graded, prompts_of
from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.evaluation.solver import evaluate_solver, headline, write_results
from src.evaluation.tasks import LabelledRows, read_labels
from src.evaluation.verifier import evaluate_graded, evaluate_pairs
from src.generation.engine import Engine
from src.generation.relayout import plain
from src.generation.sampling import Sampling
from src.logs import RunLog
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.settings.declaration import Settings, flat
from src.settings.training import EvaluationSettings, RuledEvaluationSettings

GradedData = list[Comparison] | list[Graded]
# What a verifier's evaluation gives that is better when it is higher, by --objective.
METRICS = {
    "pairwise": ("accuracy", "margin"),
    "pointwise": ("correlation",),
    "classification": ("accuracy",),
}


@dataclass(frozen=True)
class SolverEvaluation:
    """Accuracy on a task by greedy generation; does nothing when no task was given.

    notes: what a user should know of the label file's rows.
    """

    data: LabelledRows | None
    notes: list[str]
    batch_size: int
    max_new_tokens: int
    max_seq_len: int

    @classmethod
    def read(
        cls,
        settings: RuledEvaluationSettings,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        max_seq_len: int,
        more: tuple[str, ...] = (),
    ) -> "SolverEvaluation":
        """Read the label file. Raises UserError for it, and for a metric that there is not.

        more: metrics that another evaluation gives.
        """
        data, notes = None, []
        if settings.task is not None and settings.label_file is not None:
            data = read_labels(settings.task, settings.label_file, settings.rule)
            asked = data.instructions, tokenizer, max_seq_len, settings.label_file
            notes = data.rows.notes + prompts_of(*asked, fate=WRONG)[1]
        evaluation = cls(data, notes, settings.eval_batch_size, max_new_tokens, max_seq_len)
        check_metric(settings.keep_best, (*more, *evaluation.metrics))
        return evaluation

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `run` returns."""
        return () if self.data is None else ("accuracy", *self.data.task.rules)

    def run(
        self,
        moment: str,
        number: int,
        model: Transformer,
        tokenizer: Tokenizer,
        parallel: Parallel,
        log: RunLog,
        settings: Settings,
    ) -> dict[str, float]:
        """The metrics. `moment`, such as "epoch 2", names the moment in the log and the files.

        number: the moment's place on the curves' axis.
        """
        if self.data is None:
            return {}
        data = self.data
        sampling = Sampling(max_new_tokens=self.max_new_tokens, temperature=0.0)
        with plain(model, parallel) as (whole, division):
            engine = Engine(whole, division, self.batch_size, self.max_seq_len)
            summary, predictions = evaluate_solver(
                engine, tokenizer, data.task, data.instructions, data.golds, sampling, log
            )
        log.info(f"after {moment}: {headline(summary)}")
        metrics = {k: v for k, v in summary.items() if isinstance(v, float)}
        log.scalars(number, metrics, prefix=f"eval/{data.task.name}")
        _write(moment, summary, predictions, parallel, log, settings)
        return metrics


@dataclass(frozen=True)
class VerifierEvaluation:
    """How a verifier ranks held-out pairs, or grades; does nothing without a label file.

    notes: what a user should know of the label file's rows.
    """

    name: str
    data: GradedData | None
    notes: list[str]
    batch_size: int

    @classmethod
    def read(
        cls,
        settings: EvaluationSettings,
        read: Callable[[str], tuple[GradedData, list[str]]],
        objective: str,
    ) -> "VerifierEvaluation":
        """Read the label file. Raises UserError for it, and for a metric that there is not."""
        data: GradedData | None = None
        notes: list[str] = []
        if settings.label_file is not None:
            data, notes = read(settings.label_file)
        name = settings.task or ("pairs" if objective == "pairwise" else "grades")
        check_metric(settings.keep_best, METRICS[objective] if data is not None else ())
        return cls(name, data, notes, settings.eval_batch_size)

    def run(
        self,
        moment: str,
        number: int,
        model: Transformer,
        parallel: Parallel,
        log: RunLog,
        settings: Settings,
        objective: str = "pairwise",
    ) -> dict[str, float]:
        """The metrics. `moment`, such as "epoch 2", names the moment in the log and the files.

        number: the moment's place on the curves' axis.
        """
        if self.data is None:
            return {}
        with plain(model, parallel) as (whole, division):
            if objective == "pairwise":
                compared = cast(list[Comparison], self.data)
                summary, rows = evaluate_pairs(whole, division, compared, self.batch_size, log)
                accuracy = 100 * summary["accuracy"]
                share = f"pair accuracy {accuracy:.1f} % on {summary['pairs']} pairs"
            else:
                graded = cast(list[Graded], self.data)
                options = objective, self.batch_size, log
                summary, rows = evaluate_graded(whole, division, graded, *options)
                metric = METRICS[objective][0]
                share = f"{metric} {summary[metric]:.3f} on {summary['graded']} grades"
        log.info(f"after {moment}: {self.name}, {share}")
        metrics = {name: x for name, x in summary.items() if isinstance(x, float)}
        log.scalars(number, metrics, prefix=f"eval/{self.name}")
        _write(moment, summary, rows, parallel, log, settings)
        return metrics


def _write(
    moment: str,
    summary: dict,
    rows: list[dict],
    parallel: Parallel,
    log: RunLog,
    settings: Settings,
) -> None:
    if parallel.is_main and log.log_dir is not None:
        suffix = f"-{moment.replace(' ', '-')}"
        write_results(log.log_dir, summary, rows, flat(settings), suffix)


def check_metric(metric: str | None, known: tuple[str, ...]) -> None:
    """Raise UserError when the evaluation gives no such metric. known: those that it gives."""
    if metric is not None and metric not in known:
        raise UserError(f"--keep_best {metric}: the evaluation gives {', '.join(known)}")


class Evaluations:
    """Runs the evaluation whenever training asks, and saves the model when it is the best so far.

    The best is the highest metric since training began; without a metric nothing is saved.
    """

    def __init__(
        self,
        evaluate: Callable[[str, int], dict[str, float]],
        metric: str | None,
        save: Callable[[], None],
        log: RunLog,
    ) -> None:
        """evaluate(moment, number) returns the metrics; save() saves the model as the best."""
        self.evaluate, self.metric, self.save, self.log = evaluate, metric, save, log
        self.best: float | None = None

    def __call__(self, moment: str, number: int) -> None:
        metrics = self.evaluate(moment, number)
        if self.metric is None or number == 0:  # nothing is trained yet
            return
        if self.best is None or metrics[self.metric] > self.best:
            self.best = metrics[self.metric]
            self.save()
            self.log.info(f"{self.metric} {self.best:.4f} after {moment}: the best so far, saved")

    @property
    def part(self) -> tuple[Callable, Callable]:
        """How to get and set what a saved run must keep of it."""
        return (lambda: self.best), (lambda best: setattr(self, "best", best))
