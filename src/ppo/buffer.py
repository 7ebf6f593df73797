"""The rollout buffer: flat tensors on the training device, without padding; minibatches are gathers on the device."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from src.models.attention import Packed
from src.models.batch import Batch, end_to_end


@dataclass(frozen=True)
class Prompt:
    """A query's ids, and the right answer where the data has one."""

    tokens: list[int]
    gold: str = ""


@dataclass
class RolloutBuffer:
    """B sequences, N tokens in all, R of them response tokens. What is known grows phase by phase.

    tokens: [N]; lengths, prompt_lengths: of each sequence; truncated: [B], by the stop reason;
    scores: [B] and its components; logprobs, ref_logprobs, entropy, values, rewards, advantages, returns: [R];
    last_values: [B], the value after the last token.
    """

    tokens: Tensor
    lengths: list[int]
    prompt_lengths: list[int]
    truncated: Tensor
    rollout_logprobs: Tensor
    scores: Tensor | None = None
    components: dict[str, Tensor] = field(default_factory=dict)
    logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    last_values: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def __post_init__(self) -> None:
        sizes, responses = torch.tensor(self.lengths), torch.tensor(self.response_lengths)
        self._starts, self._response_starts = sizes.cumsum(0) - sizes, responses.cumsum(0) - responses

    @property
    def response_lengths(self) -> list[int]:
        return [length - prompt for length, prompt in zip(self.lengths, self.prompt_lengths)]

    def select(self, rows: list[int]) -> tuple[Batch, Tensor]:
        """Some sequences as a batch, and the indices [r] of their response tokens in the tensors of length R."""
        lengths = [self.lengths[i] for i in rows]
        tokens = end_to_end(self._starts[rows], lengths).to(self.tokens.device)
        batch = Batch(self.tokens[tokens], lengths, [self.prompt_lengths[i] for i in rows])
        return batch, end_to_end(self._response_starts[rows], batch.responses).to(self.tokens.device)

    def response_layout(self) -> Packed:
        """How the response tokens [R] lie in a rectangle [B, longest response]."""
        return Packed(self.response_lengths, self.tokens.device)

    def __len__(self) -> int:
        return len(self.lengths)
