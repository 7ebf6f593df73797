"""The reference's log-probabilities: by a frozen model at each step, or found once and kept.

A response's number depends on the model and its row alone, to the last bit, whatever is computed
with it: so both ways give the same.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from src.checkpoint.manifest import sync
from src.errors import UserError
from src.generation.relayout import plain
from src.logs import RunLog
from src.models.batch import Batch, PromptTree, Sequence, over_ranks, packed, response_logprobs
from src.models.transformer import Transformer, evaluating
from src.parallel.context import ALONE, ContextGroup
from src.parallel.deterministic import same_rows
from src.parallel.setup import Parallel, agreed
from src.trainer.passes import Passes, from_last_stage, passes_of

Groups = list[list[Sequence]]


def sums(logprobs: Tensor, lengths: list[int]) -> Tensor:
    """Σ_t log p of each response, [R] → [responses], fp64: differences of such sums are small."""
    return torch.stack([part.sum() for part in logprobs.double().split(lengths)])


def scored(
    model: Transformer,
    passes: Passes,
    parts: list[Groups],
    share_prompts: bool,
    parallel: Parallel,
    context: ContextGroup = ALONE,
) -> list[Tensor]:
    """Σ_t log π(y_t) of each response of some micro-batches of groups, [responses] each, fp64.

    passes: the model's; context: ranks that have the same groups, and divide their tokens.
    """
    device = parallel.device
    sizes = [sum(map(len, groups)) for groups in parts]
    every = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    of_part = every.split(sizes)

    def batch_of(number: int) -> Batch | PromptTree:
        return packed(parts[number], share_prompts, device, context)

    def read(number: int) -> None:
        batch = batch_of(number)
        logprobs, _ = response_logprobs(model, batch)
        of_part[number].copy_(sums(logprobs, batch.responses))

    with evaluating(model), same_rows():
        passes.score(range(len(parts)), batch_of, read)
    return list(from_last_stage(every, parallel).split(sizes))


class Reference(Protocol):
    """Gives Σ_t log π_ref(y_t) of rows' responses, fp64."""

    @property
    def model(self) -> Transformer | None:
        """The one that computes them, if any does."""
        ...

    def __call__(self, turns: list[list[int]], parts: list[Groups]) -> list[Tensor]:
        """Of micro-batches of rows, [responses] each. parts: the groups of the rows in `turns`."""
        ...


class LiveReference:
    """By a frozen model, whenever it is asked."""

    def __init__(self, model: Transformer, share_prompts: bool, parallel: Parallel) -> None:
        """parallel: those of its ranks that divide the tokens of rows ask for the same ones."""
        self.model, self.share_prompts = model.requires_grad_(False), share_prompts
        self.passes, self.parallel = passes_of(model, parallel), parallel

    def __call__(self, turns: list[list[int]], parts: list[Groups]) -> list[Tensor]:
        options = self.share_prompts, self.parallel, self.parallel.context
        return scored(self.model, self.passes, parts, *options)


class KeptReference:
    """From what was found before, for each row's responses in their order."""

    model = None

    def __init__(self, of_rows: list[list[float]], device: torch.device) -> None:
        self.of_rows, self.device = of_rows, device

    def __call__(self, turns: list[list[int]], parts: list[Groups]) -> list[Tensor]:
        numbers = ([x for row in rows for x in self.of_rows[row]] for rows in turns)
        return [torch.tensor(x, dtype=torch.float64, device=self.device) for x in numbers]


class Cache:
    """A file of the reference's numbers for a whole train file, and of what it is.

    key: what they depend on, a digest by its name: the model, the tokenizer, the train file, …
    """

    def __init__(self, path: str, key: dict[str, str]) -> None:
        self.path, self.key = Path(path), key

    def load(self, parallel: Parallel, log: RunLog) -> list[list[list[float]]] | None:
        """The lists of `save`, on all ranks; None where the file is not there or is stale.

        The log says what it is stale by. Raises UserError for a file that is none of ours.
        """
        found: list = agreed(lambda: self._read() if parallel.is_main else [None, ""])
        torch.distributed.broadcast_object_list(found, src=0)
        lists, why = found
        if why:
            log.warning(f"--cache_reference {self.path}: is stale ({why}), and is made again")
        elif lists is not None:
            log.info(f"the reference's log-probabilities are those of {self.path}")
        return lists

    def _read(self) -> list:
        """[lists or None, why they are not used or ""]."""
        if not self.path.exists():
            return [None, ""]
        before, tensors = read_cache(self.path)
        changed = [name for name in self.key if before.get(name) != self.key[name]]
        if changed:
            return [None, f"another {', '.join(changed)}"]
        lists = []
        for numbers, sizes in tensors:
            rest = iter(numbers.tolist())
            lists.append([[next(rest) for _ in range(size)] for size in sizes.tolist()])
        return [lists, ""]

    def save(self, lists: list[list[list[float]]], parallel: Parallel) -> None:
        """Write lists of rows' numbers, whole or not at all. All ranks come here."""
        agreed(lambda: self._write(lists) if parallel.is_main else None)

    def _write(self, lists: list[list[list[float]]]) -> None:
        tensors = {}
        for i, of_rows in enumerate(lists):
            tensors[f"{i}/logprobs"] = torch.tensor(
                [x for row in of_rows for x in row], dtype=torch.float64
            )
            tensors[f"{i}/sizes"] = torch.tensor([len(row) for row in of_rows])
        unfinished = self.path.with_name(f".tmp-{self.path.name}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, unfinished, {"key": json.dumps(self.key)})
            sync(unfinished)
            unfinished.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--cache_reference {self.path}: cannot be written: {error}") from None


def read_cache(
    path: Path, only_key: bool = False
) -> tuple[dict[str, str], list[tuple[Tensor, Tensor]]]:
    """A cache's key, and of each list its numbers and each row's count of them.

    only_key: the numbers are left where they are. Raises UserError for a file that is none of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            n = 0 if only_key else len(list(file.keys())) // 2
            key = json.loads((file.metadata() or {})["key"])
            names = [(f"{i}/logprobs", f"{i}/sizes") for i in range(n)]
            return key, [(file.get_tensor(a), file.get_tensor(b)) for a, b in names]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"--cache_reference {path}: is no file of the reference's log-probabilities ({error}); "
            "name another, or remove it"
        ) from None


def check_cache(path: str) -> None:
    """Raise UserError where a cache is to be that is something else."""
    if Path(path).exists():
        read_cache(Path(path), only_key=True)


def score_all(
    model: Transformer,
    groups: Groups,
    share_prompts: bool,
    limits: tuple[int, int],
    parallel: Parallel,
    log: RunLog,
) -> list[list[float]]:
    """The model's numbers for every group, the same on every rank.

    limits: groups, and tokens, at a time. Of a pipeline a copy computes them, see `plain`.
    """
    lengths = [sum(len(s.tokens) for s in group) for group in groups]
    bar = log.progress(len(groups), "scoring by the reference", unit="row", work=sum(lengths))
    with plain(model, parallel) as (whole, division), bar:
        passes = passes_of(whole, division)

        def compute(rows: list[int]) -> list[list[float]]:
            chosen = [groups[i] for i in rows]
            (of_responses,) = scored(whole, passes, [chosen], share_prompts, division)
            return [part.tolist() for part in of_responses.split([len(x) for x in chosen])]

        return over_ranks(compute, lengths, limits[0], division, bar, limits[1])


def digest_of(value: object) -> str:
    """A digest of plain values, for a cache's key."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()


def references(
    lists_of: list[Groups],
    cache: Cache | None,
    load: Callable[[], Transformer],
    share_prompts: bool,
    limits: tuple[int, int],
    parallel: Parallel,
    log: RunLog,
) -> list[Reference]:
    """A reference for each list of groups: of a frozen model, or with a cache of its numbers.

    load: the model, which is the policy before it is trained; limits: see `score_all`.
    """
    if cache is None:
        return [LiveReference(load(), share_prompts, parallel)] * len(lists_of)
    lists = cache.load(parallel, log)
    if lists is None:
        model = load()
        lists = [
            score_all(model, groups, share_prompts, limits, parallel, log) for groups in lists_of
        ]
        cache.save(lists, parallel)
        log.info(f"wrote the reference's log-probabilities to {cache.path}")
    return [KeptReference(of_rows, parallel.device) for of_rows in lists]
