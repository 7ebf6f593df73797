"""Evaluations inside a training run: before the first epoch (0) and after each, written beside the log."""

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
        raise UserError(f"--task {task} --label_file {label_file}: evaluation needs both; give both or neither")
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
        cls, task: str | None, label_file: str | None, batch_size: int, max_new_tokens: int, max_seq_len: int
    ) -> "SolverEvaluation":
        data = read_evaluation(task, label_file) if _both_or_none(task, label_file) else None
        return cls(data, batch_size, max_new_tokens, max_seq_len)

    def run(
        self, epoch: int, model: Transformer, tokenizer: Tokenizer, parallel: Parallel, log: RunLog, settings: dict
    ) -> None:
        if self.data is None:
            return
        engine = Engine(model, parallel, self.batch_size, self.max_seq_len)
        sampling = Sampling(max_new_tokens=self.max_new_tokens, temperature=0.0)
        data = self.data
        summary, predictions = evaluate_solver(engine, tokenizer, data.task, data.instructions, data.golds, sampling, log)
        log.info(f"after epoch {epoch}: {headline(summary)}")
        log.scalars(epoch, {k: v for k, v in summary.items() if isinstance(v, float)}, prefix=f"eval/{data.task.name}")
        if parallel.is_main:
            write_results(log.log_dir, summary, predictions, settings, f"-epoch-{epoch}")


@dataclass(frozen=True)
class VerifierEvaluation:
    """Accuracy on held-out pairs; does nothing when no label file was given."""

    task: str
    pairs: list[Comparison] | None
    warning: str | None
    batch_size: int

    @classmethod
    def read(
        cls, task: str | None, label_file: str | None, tokenizer: Tokenizer, batch_size: int, max_seq_len: int, strict: bool
    ) -> "VerifierEvaluation":
        pairs, warning = comparisons(label_file, tokenizer, max_seq_len, strict) if label_file else (None, None)
        return cls(task or "pairs", pairs, warning, batch_size)

    def run(self, epoch: int, model: Transformer, parallel: Parallel, log: RunLog, settings: dict) -> None:
        if self.pairs is None:
            return
        summary, rows = evaluate_pairs(model, parallel, self.pairs, self.batch_size, log)
        log.info(f"after epoch {epoch}: {self.task}, pair accuracy {100 * summary['accuracy']:.1f} % on {summary['pairs']} pairs")
        log.scalars(epoch, {"accuracy": summary["accuracy"], "margin": summary["margin"]}, prefix=f"eval/{self.task}")
        if parallel.is_main:
            write_results(log.log_dir, summary, rows, settings, f"-epoch-{epoch}")
