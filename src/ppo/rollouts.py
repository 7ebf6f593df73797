"""From prompts to a buffer of scored rollouts: the first phase of an iteration."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from src.data.encoding import Prompt
from src.generation.engine import Engine, OnTokens
from src.generation.relayout import RelaidEngine
from src.generation.sampling import Sampling
from src.parallel.setup import Parallel
from src.ppo.buffer import RolloutBuffer, by_place
from src.ppo.rewards import Reward, earned
from src.ppo.roles import Stage
from src.ppo.statistics import Timer
from src.settings.ppo import RolloutSettings

Draw = Callable[[], list[Prompt]]


class Rollouts:
    """Generates, rewards, and leaves out what teaches nothing."""

    def __init__(
        self,
        stage: Stage,
        engine: Engine | RelaidEngine,
        sampling: Sampling,
        stop_ids: set[int],
        rewards: list[tuple[float, Reward]],
        settings: RolloutSettings,
        parallel: Parallel,
        timer: Timer,
    ) -> None:
        """rewards: (weight, reward) pairs, summed; see `src/ppo/rewards/`."""
        self.stage, self.engine, self.sampling, self.stop_ids = stage, engine, sampling, stop_ids
        self.rewards, self.settings, self.parallel, self.timer = rewards, settings, parallel, timer
        # Sums over all rollouts of the iteration, those that were left out included.
        self.sums: dict[str, float] = {}

    def make(
        self,
        number: int,
        prompts: list[Prompt],
        more: Draw | None = None,
        on_tokens: OnTokens | None = None,
    ) -> RolloutBuffer:
        """This rank's part of iteration `number`'s rollouts, with their scores.

        prompts: of all ranks, the samples of one prompt side by side; more: the next batch of them,
        the same by default.
        Groups whose rewards are all equal are replaced by others, if that is asked for.
        """
        self.sums = {}
        size, rounds = len(prompts), max(1, self.settings.filter_rounds)
        parts: list[RolloutBuffer] = []
        slots: list[int] = []  # of all ranks' rollouts that are kept
        for turn in range(rounds):
            first_sample = (number * rounds + turn) * size  # no sample is drawn twice
            buffer = self._generate(prompts, first_sample, on_tokens)
            self._reward(buffer)
            kept = self._worth_learning(buffer, size)[: size - len(slots)]
            parts.append(buffer if len(kept) == size else self._only(buffer, kept, len(slots)))
            slots += [turn * size + place for place in kept]
            if len(slots) == size or turn + 1 == rounds:
                break
            prompts = more() if more else prompts
        buffer = parts[0] if len(parts) == 1 else RolloutBuffer.joined(parts)
        lengths = by_place(buffer.response_lengths, buffer.places, len(slots), self.parallel)
        buffer.lengths_of_all, buffer.slots = [int(n) for n in lengths], slots
        return buffer

    def _generate(
        self,
        prompts: list[Prompt],
        first_sample: int,
        on_tokens: OnTokens | None,
    ) -> RolloutBuffer:
        # Samples of one prompt stay on one rank, where there are prompts for all ranks: the prompt
        # is prefilled once.
        samples, p, device = self.settings.samples_per_prompt, self.parallel, self.parallel.device
        unit = samples if len(prompts) // samples >= p.dp_size else 1
        places = [i for i in range(len(prompts)) if i // unit % p.dp_size == p.dp_rank]
        local_prompts = [prompts[i] for i in places]
        masks: dict[str, Any] = {"keep_masks": True} if self.settings.replay_mask else {}

        # A change of layout is part of generating, and also named by itself.
        with self.stage.at_work("policy"), self.timer("generate"):
            completions = self.engine.generate(
                [prompt.tokens for prompt in local_prompts],
                self.sampling,
                self.stop_ids,
                [first_sample + i for i in places],
                on_tokens,
                **masks,
            )

        keeps_masks = bool(masks) and self.sampling.leaves_out
        return RolloutBuffer.of(local_prompts, completions, places, device, keeps_masks)

    @torch.no_grad()
    def _reward(self, buffer: RolloutBuffer) -> None:
        """The components of the reward, and their weighted sum, [B] each.

        A component without an opinion adds nothing to the sum.
        """
        with self.stage.at_work("reward"), self.timer("reward"):
            buffer.components, buffer.scores, buffer.rewarded = earned(self.rewards, buffer)
            known = {name: ~x.isnan() for name, x in buffer.components.items()}
        self._add("reward", buffer.scores, buffer.rewarded)
        for name, x in buffer.components.items():
            self._add(f"reward/{name}", x, known[name])
        self.sums["rollouts"] = self.sums.get("rollouts", 0.0) + len(buffer)

    def _add(self, name: str, x: Tensor, known: Tensor) -> None:
        """Add the known numbers of a column to its sum, and count them."""
        for key, part in ((name, x[known]), (f"known/{name}", known)):
            self.sums[key] = self.sums.get(key, 0.0) + float(part.sum())

    def _worth_learning(self, buffer: RolloutBuffer, size: int) -> list[int]:
        """The places of the rollouts that are kept: all that have a reward.

        With --filter_rounds only those in groups whose rewards differ. size: rollouts of all ranks.
        """
        samples = self.settings.samples_per_prompt
        scores = torch.where(buffer.rewarded, buffer.scores, torch.nan)
        scores = by_place(scores, buffer.places, size, self.parallel)
        worth = ~scores.isnan()  # [size]
        if samples > 1:
            groups = scores.view(-1, samples)  # [prompts, samples]
            differ = groups.nan_to_num(-torch.inf).amax(1) > groups.nan_to_num(torch.inf).amin(1)
            self._add("equal_groups", (~differ).double(), torch.ones_like(differ))
            if self.settings.filter_rounds:
                worth &= differ.repeat_interleave(samples)
        return worth.nonzero().flatten().tolist()

    def _only(self, buffer: RolloutBuffer, kept: list[int], count: int) -> RolloutBuffer:
        """The rollouts at the kept places, which become count, count + 1, …"""
        new_place = {place: count + i for i, place in enumerate(kept)}
        rows = [row for row, place in enumerate(buffer.places) if place in new_place]
        return buffer.take(rows, [new_place[buffer.places[row]] for row in rows])
