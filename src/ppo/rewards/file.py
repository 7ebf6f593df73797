"""A user's own function as a reward (--reward_file FILE.py:FUNCTION)."""

import asyncio
import contextlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.parallel.setup import Parallel, agreed
from src.ppo.buffer import RolloutBuffer
from src.ppo.rewards import RewardFailed, RewardInputs

ROWS_AT_ONCE = 64  # of a user's function
LARGEST = torch.finfo(torch.float32).max
# Three, so that a pair for all of them is no list of a number for each.
MADE_UP = [
    "This answer is made up, to try the reward: 1 + 1 = 2",
    "And so is this one.",
    "It is 2. #### 2",
]
# What other suites call what they pass, and where it would stand here; None: nowhere.
PLACES = {
    **dict.fromkeys(("prompts", "prompt", "queries", "query", "questions", "instructions"), 0),
    **dict.fromkeys(("responses", "response", "completions", "completion", "solution_str"), 1),
    **dict.fromkeys(("rows", "labels", "label", "ground_truth", "ground_truths"), 2),
    **dict.fromkeys(("data_source", "extra_info"), None),
}
CALLED = ("prompts", "responses", "rows")
BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
Score = Callable[[list[str], list[str], list[dict]], Any]


class FileReward:
    """What a user's function says of each response; NaN where it has no opinion."""

    name = "file"

    def __init__(self, where: str, score: Score, tokenizer: Tokenizer, parallel: Parallel) -> None:
        self.score, self.tokenizer, self.parallel = UserScore(where, score), tokenizer, parallel

    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        scores = torch.zeros(len(buffer), device=buffer.tokens.device)  # [B]
        # One rank of each model asks, and tells the others: a function need not say the same twice.
        try:
            answers = agreed(lambda: self._ask(buffer) if self.parallel.model_rank == 0 else None)
        except UserError as error:
            raise RewardFailed(str(error)) from error
        if answers is not None:
            numbers = [math.nan if answer is None else answer for answer in answers]
            scores += torch.tensor(numbers, dtype=torch.float32, device=scores.device)
        dist.all_reduce(scores, group=self.parallel.model_group)
        return scores

    def _ask(self, buffer: RolloutBuffer) -> list[float | None]:
        texts = [self.tokenizer.decode(ids) for ids in buffer.responses()]
        prompts = [prompt.row["instruction"] for prompt in buffer.prompts]
        rows = [prompt.row for prompt in buffer.prompts]
        answers: list[float | None] = []
        for start in range(0, len(texts), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            answers += self.score(prompts[part], texts[part], rows[part])
        return answers


class UserScore:
    """A user's function: score(prompts, responses, rows), lists of texts and of data rows.

    It returns, or when awaited gives, a finite number for each response, or None: no opinion.
    """

    def __init__(self, where: str, score: Score) -> None:
        """where: FILE.py:FUNCTION, for messages."""
        self.where, self.score = where, score
        # One loop for all calls: what a function keeps open between them belongs to it.
        self.runner: asyncio.Runner | None = None

    def __call__(
        self, prompts: list[str], responses: list[str], rows: list[dict]
    ) -> list[float | None]:
        """Raises UserError for what it raises, or when it returns something else."""
        try:
            with _unchanged_process():
                answer = self.score(list(prompts), list(responses), [dict(row) for row in rows])
                if inspect.isawaitable(answer):
                    self.runner = self.runner or asyncio.Runner()
                    answer = self.runner.run(_awaited(answer))
                answers = _listed(answer)
        # Whatever a user's code raises is the user's to see; Ctrl-C is nobody's failure.
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            raise UserError(self._head + self._told(error, rows)) from error
        wrong = _wrong(answer, answers, responses)
        if wrong or answers is None:
            raise UserError(
                f"{self._head}returned {wrong}; a list is expected, with a finite number, or None "
                "(no opinion), for each response"
            )
        return [None if x is None else float(x) for x in answers]

    @property
    def _head(self) -> str:
        return f"--reward_file {self.where}: "

    def _told(self, error: BaseException, rows: list[dict]) -> str:
        """What the function raised, where, and for a field that a row has not, what it has."""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
        file = Path(self.where.rpartition(":")[0]).resolve()
        own = [frame for frame in frames if Path(frame.filename).resolve() == file]
        place = "".join(f" ({frame.filename}:{frame.lineno})" for frame in (own or frames)[-1:])
        told = f"{type(error).__name__}: {error}{place}"
        field = error.args[0] if isinstance(error, KeyError) and error.args else None
        lacking = [i for i, row in enumerate(rows) if field not in row]
        if isinstance(field, str) and lacking:
            names = ", ".join(rows[lacking[0]])
            told += f"; rows[{lacking[0]}] has no field {field!r}: it has {names}"
        return told

    def try_out(self, row: dict) -> None:
        """Call it once, before any work, with three made-up answers to a data row's prompt.

        Raises UserError when that fails.
        """
        try:
            self([row["instruction"]] * 3, MADE_UP, [row] * 3)
        except UserError as error:
            why = str(error).removeprefix(self._head)
            raise UserError(
                f"{self._head}called with three made-up answers before training: {why}"
            ) from error


@contextlib.contextmanager
def _unchanged_process() -> Iterator[None]:
    """Puts back what code that loads a model of its own sets for the whole process."""
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    device, threads, folder = torch.get_default_device(), torch.get_num_threads(), os.getcwd()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        os.chdir(folder)


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def _listed(answer: object) -> list[Any] | None:
    """The items of what a function returned, as Python's; None when that is no list of them."""
    if hasattr(answer, "tolist"):  # an array or a tensor
        answer = answer.tolist()
    if not isinstance(answer, list | tuple | Iterator):
        return None
    return [_plain(x) for x in answer]


def _plain(x: Any) -> Any:
    """A number of numpy's or torch's as Python's."""
    with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
        return x.item()
    return x


def _is_number(x: object) -> bool:
    """Whether it is a number that fp32 holds."""
    return isinstance(x, int | float) and abs(x) <= LARGEST  # NaN is not


def _wrong(answer: object, answers: list[Any] | None, responses: list[str]) -> str:
    """What is wrong with what came back, and for which response; "" when nothing."""
    if answers is None:
        return _described(answer)
    if len(answers) != len(responses):
        return f"{len(answers)} numbers for {len(responses)} responses"
    for i, (x, text) in enumerate(zip(answers, responses)):
        if not (x is None or _is_number(x)):
            return f"{_described(x)} for responses[{i}], {text[:60]!r}"
    return ""


def _described(x: object) -> str:
    """A value with its type, and no more of it than a line holds."""
    if x is None or isinstance(x, int | float):
        return str(x)[:60]
    return f"{repr(x)[:60]} ({type(x).__name__})"


def load_score(where: str) -> Score:
    """The function of "FILE.py:NAME".

    Raises UserError when there is none, or it cannot be called as `UserScore` calls it.
    """
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
    # Its neighbours can be imported, as of a script; last, so that they hide no installed module.
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        with _unchanged_process():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--reward_file {where}: {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    score = getattr(module, name, None)
    if not callable(score):
        known = [
            n
            for n, x in vars(module).items()
            if callable(x) and getattr(x, "__module__", "") == spec.name
        ]
        raise UserError(
            f"--reward_file {where}: {path} has no function {name}; it has "
            f"{', '.join(known) or 'none'}"
        )
    _check_signature(where, name, score)
    return score


def _check_signature(where: str, name: str, score: Callable) -> None:
    """Raise UserError when a function does not take three lists by their places."""
    try:
        signature = inspect.signature(score)
    except (TypeError, ValueError):  # of some that are written in C: the first call will tell
        return
    of_trl = "completions" in signature.parameters
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    try:
        signature.bind([], [], [])
        fits = not (of_trl and inspect.Parameter.VAR_KEYWORD in kinds)
    except TypeError:
        fits = False
    names = [x.name for x in signature.parameters.values() if x.kind in BY_PLACE]
    moved = [x for i, x in enumerate(names[:3]) if PLACES.get(x, i) != i]
    if fits and not moved:
        return
    advice = f"; its {moved[0]!r} would get the {CALLED[names.index(moved[0])]}" if moved else ""
    if of_trl:
        advice += (
            f". That is how TRL calls its own; for this one write: def score(prompts, responses, "
            f"rows): return {name}(completions=responses, ...)"
        )
    raise UserError(
        f"--reward_file {where}: is {name}{signature}, and is called as {name}(prompts, responses, "
        f"rows): three lists of one length, for a list of numbers{advice}"
    )


def make(inputs: RewardInputs) -> FileReward:
    where = inputs.settings.rewards.reward_file
    assert where is not None
    return FileReward(where, load_score(where), inputs.tokenizer, inputs.parallel)
