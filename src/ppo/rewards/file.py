"""A user's own function as a reward (--reward_file FILE.py:FUNCTION)."""

import importlib.util
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.parallel.setup import Parallel, agreed
from src.ppo.buffer import RolloutBuffer
from src.ppo.rewards import RewardInputs

ROWS_AT_ONCE = 64  # of a user's function
Score = Callable[[list[str], list[str], list[dict]], list[float]]


class FileReward:
    """What a user's function says: score(prompts, responses, rows), a number for each.

    It is called with lists of texts and of data rows.
    """

    name = "file"

    def __init__(self, where: str, score: Score, tokenizer: Tokenizer, parallel: Parallel) -> None:
        self.where, self.score, self.tokenizer, self.parallel = where, score, tokenizer, parallel

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        scores = torch.zeros(len(buffer), device=buffer.tokens.device)  # [B]
        # One rank of each model asks, and tells the others: a function need not say the same twice.
        numbers = agreed(lambda: self._numbers(buffer) if self.parallel.mp_rank == 0 else None)
        if numbers is not None:
            scores += torch.tensor(numbers, dtype=torch.float32, device=scores.device)
        dist.all_reduce(scores, group=self.parallel.mp_group)
        return scores

    def _numbers(self, buffer: RolloutBuffer) -> list[float]:
        texts = [self.tokenizer.decode(ids) for ids in buffer.responses()]
        prompts = [prompt.row["instruction"] for prompt in buffer.prompts]
        rows = [prompt.row for prompt in buffer.prompts]
        numbers: list[float] = []
        for start in range(0, len(texts), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            numbers += self._answer(prompts[part], texts[part], rows[part])
        return numbers

    def _answer(self, prompts: list[str], texts: list[str], rows: list[dict]) -> list[float]:
        try:
            answer = self.score(prompts, texts, [dict(row) for row in rows])
            numbers = [float(x) for x in answer]
        except Exception as error:  # whatever a user's code raises is the user's to see
            raise UserError(
                f"--reward_file {self.where}: {type(error).__name__}: {error}{_line_of(error)}"
            ) from error
        wrong = [x for x in numbers if not math.isfinite(x)]
        if len(numbers) != len(texts) or wrong:
            returned = wrong[0] if wrong else f"{len(numbers)} numbers for {len(texts)} responses"
            raise UserError(
                f"--reward_file {self.where}: returned {returned}; a finite number for each "
                "response is expected"
            )
        return numbers


def _line_of(error: Exception) -> str:
    """Where in the user's own code it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if frame.filename != __file__]
    return (
        f" ({users[-1].filename}:{users[-1].lineno})" if users else ", which is no list of numbers"
    )


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
    assert spec is not None and spec.loader is not None  # its name ends in .py
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
            f"--reward_file {where}: {path} has no function {name}; it has "
            f"{', '.join(known) or 'none'}"
        )
    return getattr(module, name)


def make(inputs: RewardInputs) -> FileReward:
    where = inputs.settings.rewards.reward_file
    assert where is not None
    return FileReward(where, load_score(where), inputs.tokenizer, inputs.parallel)
