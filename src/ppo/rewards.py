"""What a response earns: each reward gives one number per rollout, and PPO adds them up by their weights."""

import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.evaluation.solver import cut_at
from src.evaluation.tasks import Task
from src.models.batch import Batch, Sequence, micro_batches, sequence_scores
from src.parallel.setup import Parallel, agreed
from src.ppo.buffer import RolloutBuffer
from src.ppo.roles import Role

NAMES = ("verifier", "rule", "file", "format", "length", "overlong")
ROWS_AT_ONCE = 64  # of a user's function
Score = Callable[[list[str], list[str], list[dict]], list[float]]


class Reward(Protocol):
    """Gives each rollout of a buffer a number."""

    name: str

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        """→ [B], fp32. All ranks of a model get the same."""


class VerifierReward:
    """The scalar head's score at the response's last token, centred and scaled by the numbers stored with the verifier.

    A verifier with another tokenizer reads the texts: the instruction as its own prompt, and the response.
    """

    name = "verifier"

    def __init__(
        self,
        role: Role,
        whole: Parallel,
        max_batch_size: int,
        max_tokens: int | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        translate: Callable[[RolloutBuffer], list[Sequence]] | None = None,
    ) -> None:
        """whole: the run's division; translate: a buffer's rollouts in the verifier's own tokens, if these are others."""
        self.role, self.whole, self.mean, self.std, self.translate = (
            role,
            whole,
            mean,
            std,
            translate,
        )
        self.limits = max_batch_size, max_tokens

    @torch.no_grad()
    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        device = buffer.tokens.device
        sequences = self.translate(buffer) if self.translate else None
        lengths = buffer.lengths if sequences is None else [len(s.tokens) for s in sequences]
        scores = torch.zeros(len(buffer), device=device)
        with self.role.parallel.active():
            for rows in self.role.share(micro_batches(lengths, *self.limits), self.whole):
                if sequences is None:
                    batch, _ = buffer.select(rows)
                else:
                    batch = Batch.of([sequences[i] for i in rows], device)
                scores[rows] = (sequence_scores(self.role.model, batch) - self.mean) / self.std
        return self.role.collect(scores, self.whole)


def translator(policy: Tokenizer, verifier: Tokenizer) -> Callable[[RolloutBuffer], list[Sequence]]:
    """From the policy's tokens to the verifier's, by way of the text. EOS stands where the policy ended by itself."""

    ending = len(verifier.response_ids(""))

    def translate(buffer: RolloutBuffer) -> list[Sequence]:
        sequences = []
        for prompt, ids, truncated in zip(
            buffer.prompts, buffer.responses(), buffer.truncated.tolist()
        ):
            query = verifier.prompt_ids(prompt.row["instruction"])
            response = verifier.response_ids(policy.decode(ids))
            if truncated:
                response = response[: len(response) - ending]
            sequences.append(Sequence(query + response, len(query)))
        return sequences

    return translate


class RuleReward:
    """1 when the task's grader finds the answer right, else 0 (a reward of 0 is a reward)."""

    name = "rule"

    def __init__(self, task: Task, tokenizer: Tokenizer) -> None:
        self.task, self.tokenizer = task, tokenizer

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        texts = [
            cut_at(self.tokenizer.decode(ids), self.task.stop) for ids in buffer.responses()
        ]  # as the evaluation reads them
        right = [
            self.task.grade(text, prompt.gold)[self.task.metric]
            for text, prompt in zip(texts, buffer.prompts)
        ]
        return torch.tensor(right, dtype=torch.float32, device=buffer.tokens.device)


class FileReward:
    """What a user's function says: score(prompts, responses, rows), lists of texts and of data rows, a number for each."""

    name = "file"

    def __init__(self, where: str, score: Score, tokenizer: Tokenizer, parallel: Parallel) -> None:
        self.where, self.score, self.tokenizer, self.parallel = where, score, tokenizer, parallel

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        scores = torch.zeros(len(buffer), device=buffer.tokens.device)
        # One rank of each model asks, and tells the others: a function need not say the same twice.
        numbers = agreed(lambda: self._numbers(buffer) if self.parallel.mp_rank == 0 else None)
        if numbers is not None:
            scores += torch.tensor(numbers, dtype=torch.float32, device=scores.device)
        dist.all_reduce(scores, group=self.parallel.mp_group)
        return scores

    def _numbers(self, buffer: RolloutBuffer) -> list[float]:
        texts = [self.tokenizer.decode(ids) for ids in buffer.responses()]
        prompts = [prompt.row["instruction"] for prompt in buffer.prompts]
        rows, found = [prompt.row for prompt in buffer.prompts], []
        for start in range(0, len(texts), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            found += self._asked(prompts[part], texts[part], rows[part])
        return found

    def _asked(self, prompts: list[str], texts: list[str], rows: list[dict]) -> list[float]:
        try:
            answer = self.score(prompts, texts, [dict(row) for row in rows])
            numbers = [float(x) for x in answer]
        except (
            Exception
        ) as error:  # whatever a user's code raises is the user's to see, with its line
            theirs = [
                frame
                for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename != __file__
            ]
            line = (
                f" ({theirs[-1].filename}:{theirs[-1].lineno})"
                if theirs
                else ", which is no list of numbers"
            )
            raise UserError(
                f"--reward_file {self.where}: {type(error).__name__}: {error}{line}"
            ) from error
        if len(numbers) != len(texts) or not all(map(math.isfinite, numbers)):
            wrong = [x for x in numbers if not math.isfinite(x)]
            said = (
                f"returned {wrong[0]}"
                if wrong
                else f"returned {len(numbers)} numbers for {len(texts)} responses"
            )
            raise UserError(
                f"--reward_file {self.where}: {said}; a finite number for each response is expected"
            )
        return numbers


def load_score(where: str) -> Score:
    """The function of "FILE.py:NAME". Raises UserError when there is none."""
    path, colon, name = where.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise UserError(
            f"--reward_file {where}: write FILE.py:FUNCTION, such as my_reward.py:score"
        )
    if not Path(path).is_file():
        raise UserError(f"--reward_file {where}: {path} is not there")
    spec = importlib.util.spec_from_file_location(f"reward_file_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"--reward_file {where}: {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(module, name, None)):
        known = [
            n
            for n, x in vars(module).items()
            if callable(x) and getattr(x, "__module__", "") == spec.name
        ]
        raise UserError(
            f"--reward_file {where}: {path} has no function {name}; it has {', '.join(known) or 'none'}"
        )
    return getattr(module, name)


class FormatReward:
    """1 where the response holds the pattern, a regular expression (`re.search`, `.` also a line's end), else 0."""

    name = "format"

    def __init__(self, pattern: str, tokenizer: Tokenizer) -> None:
        self.pattern, self.tokenizer = compiled(pattern), tokenizer

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        found = [
            self.pattern.search(self.tokenizer.decode(ids)) is not None
            for ids in buffer.responses()
        ]
        return torch.tensor(found, dtype=torch.float32, device=buffer.tokens.device)


def compiled(pattern: str) -> re.Pattern:
    """Raises UserError for what is no regular expression."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"--format_pattern {pattern}: is no regular expression ({error})") from None


class LengthReward:
    """The response's length as a share of max_new_tokens; with a negative weight, a price of length."""

    name = "length"

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        return (
            torch.tensor(buffer.response_lengths, device=buffer.tokens.device) / self.max_new_tokens
        )


class OverlongReward:
    """0 up to max_new_tokens − margin, then falling in a line to −1 at max_new_tokens (arXiv 2503.14476, equation 13)."""

    name = "overlong"

    def __init__(self, max_new_tokens: int, margin: int) -> None:
        self.max_new_tokens, self.margin = max_new_tokens, margin

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        lengths = torch.tensor(buffer.response_lengths, device=buffer.tokens.device)
        return ((self.max_new_tokens - self.margin - lengths) / self.margin).clamp(-1.0, 0.0)
