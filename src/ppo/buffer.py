"""The rollout buffer: flat tensors on the training device, without padding.

Minibatches are gathers on the device.
"""

from dataclasses import Field, dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from src.data.encoding import Prompt
from src.generation.engine import Completion
from src.models.attention import Packed
from src.models.batch import Batch, Ranges, end_to_end
from src.parallel.setup import Parallel
from src.ppo.homes import Homes, moved

PER_TOKEN, PER_SEQUENCE = {"per": "token"}, {"per": "sequence"}


def _later(kind: dict[str, str]) -> Any:
    """A tensor that is None until its phase."""
    return field(default=None, metadata=kind)


@dataclass
class RolloutBuffer:
    """B sequences, N tokens in all, R of them response tokens. What is known grows phase by phase.

    prompts: of each sequence; places: its number among the sequences of all ranks; prompts_of_all,
    lengths_of_all: prompts and response tokens of all ranks' sequences, by their places, and homes:
    which ranks have them (None: nobody asks); slots: the number that each of these
    had before others were left out, so that slots // samples is its group; tokens: [N]; lengths: of
    each sequence; truncated: [B], by the stop reason; rollout_logprobs: [R], of sampling; kept: [R,
    bytes], which of this rank's vocabulary each token was chosen among; components: of the reward,
    [B] each, NaN where there is no opinion; rewarded: [B], whether any of them has one; scores:
    their sum, [B]; shaped: what is learned from, [B]; logprobs, ref_logprobs, entropy, values,
    rewards, advantages, returns: [R]; last_values: [B], the value after the last token; old_values,
    value_targets: [R], the values and returns in the value model's own units.
    """

    prompts: list[Prompt]
    places: list[int]
    tokens: Tensor
    lengths: list[int]
    truncated: Tensor = field(metadata=PER_SEQUENCE)
    rollout_logprobs: Tensor = field(metadata=PER_TOKEN)
    kept: Tensor | None = _later(PER_TOKEN)
    components: dict[str, Tensor] = field(default_factory=dict)
    rewarded: Tensor = _later(PER_SEQUENCE)
    scores: Tensor = _later(PER_SEQUENCE)
    shaped: Tensor = _later(PER_SEQUENCE)
    logprobs: Tensor = _later(PER_TOKEN)
    ref_logprobs: Tensor = _later(PER_TOKEN)
    entropy: Tensor = _later(PER_TOKEN)
    values: Tensor = _later(PER_TOKEN)
    last_values: Tensor = _later(PER_SEQUENCE)
    rewards: Tensor = _later(PER_TOKEN)
    advantages: Tensor = _later(PER_TOKEN)
    returns: Tensor = _later(PER_TOKEN)
    old_values: Tensor = _later(PER_TOKEN)
    value_targets: Tensor = _later(PER_TOKEN)
    prompts_of_all: list[Prompt] = field(default_factory=list)
    lengths_of_all: list[int] = field(default_factory=list)
    homes: Homes | None = None
    slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = torch.tensor(self.lengths).long()  # [B]
        responses = torch.tensor(self.response_lengths).long()
        self._starts = sizes.cumsum(0) - sizes  # of each sequence in [N]
        self._response_starts = responses.cumsum(0) - responses  # of each response in [R]
        self._elsewhere: list[RolloutBuffer] = []  # the same rollouts, in other homes

    @property
    def prompt_lengths(self) -> list[int]:
        return [len(prompt.tokens) for prompt in self.prompts]

    @property
    def response_lengths(self) -> list[int]:
        return [length - prompt for length, prompt in zip(self.lengths, self.prompt_lengths)]

    def responses(self) -> list[list[int]]:
        """The response tokens of each sequence, on the host."""
        return [
            ids[p:].tolist()
            for ids, p in zip(self.tokens.cpu().split(self.lengths), self.prompt_lengths)
        ]

    def select(self, rows: list[int]) -> tuple[Batch, Tensor]:
        """Some sequences as a batch, and where their r response tokens lie in [R]."""
        lengths = [self.lengths[i] for i in rows]
        tokens = end_to_end(self._starts[rows], lengths).to(self.tokens.device)
        ranges: list[Ranges] = [((len(self.prompts[i].tokens), self.lengths[i]),) for i in rows]
        batch = Batch(self.tokens[tokens], lengths, ranges)
        return batch, end_to_end(self._response_starts[rows], batch.responses).to(
            self.tokens.device
        )

    def batch(self, rows: list[int]) -> Batch:
        """Some sequences as a batch."""
        return self.select(rows)[0]

    def take(self, rows: list[int], places: list[int]) -> "RolloutBuffer":
        """A buffer of some of the sequences, under new places."""
        batch, responses = self.select(rows)
        index = {
            "token": responses,
            "sequence": torch.tensor(rows, dtype=torch.long, device=self.tokens.device),
        }
        known: dict[str, Any] = {f.name: x[index[f.metadata["per"]]] for f, x in self._tensors()}
        return RolloutBuffer(
            prompts=[self.prompts[i] for i in rows],
            places=places,
            tokens=batch.tokens,
            lengths=[self.lengths[i] for i in rows],
            components={name: x[index["sequence"]] for name, x in self.components.items()},
            **known,
        )

    @classmethod
    def of(
        cls,
        prompts: list[Prompt],
        completions: list[Completion],
        places: list[int],
        device: torch.device,
        keeps_masks: bool = False,
    ) -> "RolloutBuffer":
        """Completions end to end, without padding, on the device.

        prompts: of each; keeps_masks: they know which tokens each was chosen among.
        """
        pairs = list(zip(prompts, completions))
        ids = [token for p, c in pairs for token in (*p.tokens, *c.tokens)]
        is_cut = [c.stop_reason == "length" for _, c in pairs]
        masks = [c.kept for c in completions if c.kept is not None] if keeps_masks else []
        return cls(
            prompts=prompts,
            places=places,
            tokens=torch.tensor(ids, dtype=torch.long, device=device),
            lengths=[len(p.tokens) + len(c.tokens) for p, c in pairs],
            truncated=torch.tensor(is_cut, dtype=torch.bool, device=device),
            rollout_logprobs=torch.tensor([x for _, c in pairs for x in c.logprobs], device=device),
            kept=torch.cat(masks) if keeps_masks else None,
        )

    @classmethod
    def joined(cls, parts: list["RolloutBuffer"]) -> "RolloutBuffer":
        """Several buffers, which know the same things, as one."""
        first = parts[0]
        tensors = [{f.name: x for f, x in part._tensors()} for part in parts]
        known: dict[str, Any] = {n: torch.cat([t[n] for t in tensors]) for n in tensors[0]}
        return cls(
            prompts=[p for part in parts for p in part.prompts],
            places=[p for part in parts for p in part.places],
            tokens=torch.cat([part.tokens for part in parts]),
            lengths=[n for part in parts for n in part.lengths],
            components={
                name: torch.cat([part.components[name] for part in parts])
                for name in first.components
            },
            **known,
        )

    def _tensors(self) -> list[tuple[Field, Tensor]]:
        """(field, tensor) of what is known of each token or sequence."""
        return [
            (f, getattr(self, f.name))
            for f in fields(self)
            if f.metadata and getattr(self, f.name) is not None
        ]

    # --- the same rollouts on the ranks of another layout -----------------------------------------

    def on(self, division: Parallel) -> "RolloutBuffer":
        """These rollouts with the models of a division; this buffer itself where these have them.

        With what sampling knew of them. All ranks come here; a rank may get none.
        """
        if self.homes is None or self.homes.layout.is_like(division.layout):
            return self
        for buffer in self._elsewhere:
            assert buffer.homes is not None
            if buffer.homes.layout.is_like(division.layout):
                return buffer
        responses = self.lengths_of_all
        lengths = [len(p.tokens) + n for p, n in zip(self.prompts_of_all, responses)]
        homes = self.homes.nearest_in(division.layout, lengths)
        way = self.homes, homes, division
        (tokens,) = moved([self.tokens], lengths, *way)
        (logprobs,) = moved([self.rollout_logprobs], responses, *way)
        (truncated,) = moved([self.truncated], [1] * len(lengths), *way)
        places = homes.places(division.rank)
        buffer = RolloutBuffer(
            [self.prompts_of_all[place] for place in places],
            places,
            tokens,
            [lengths[place] for place in places],
            truncated,
            logprobs,
            prompts_of_all=self.prompts_of_all,
            lengths_of_all=responses,
            homes=homes,
        )
        self._elsewhere.append(buffer)
        return buffer

    def bring(self, source: "RolloutBuffer", parallel: Parallel, *names: str) -> None:
        """What the same rollouts' buffer of another layout knows, to this one. All ranks come here.

        names: of tensors in fp32.
        """
        if source is self:
            return
        assert source.homes is not None and self.homes is not None
        for kind, sizes in ((PER_TOKEN, self.lengths_of_all), (PER_SEQUENCE, None)):
            of_kind = [f.name for f in fields(self) if f.name in names and f.metadata == kind]
            if of_kind:
                columns = [getattr(source, name) for name in of_kind]
                sizes = sizes or [1] * len(self.lengths_of_all)
                new = moved(columns, sizes, source.homes, self.homes, parallel)
                for name, column in zip(of_kind, new):
                    setattr(self, name, column)

    def response_layout(self) -> Packed:
        """How the response tokens [R] lie in a rectangle [B, longest response]."""
        return Packed(self.response_lengths, self.tokens.device)

    def __len__(self) -> int:
        return len(self.lengths)


def by_place(
    local: list[int] | Tensor, places: list[int], total: int, parallel: Parallel
) -> Tensor:
    """Every rank's numbers, one per rollout, by the rollouts' places: fp64, [total].

    The same on all ranks of the run. places: of this rank's; total: rollouts of all ranks;
    parallel: the division whose models have them.
    """
    whole = torch.zeros(total, dtype=torch.float64, device=parallel.device)
    if parallel.speaks:
        whole[places] = torch.as_tensor(local, dtype=torch.float64, device=parallel.device)
    dist.all_reduce(whole)
    return whole
