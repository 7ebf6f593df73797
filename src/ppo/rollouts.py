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
from src.ppo.homes import Homes
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
        # What other ranks compute of a buffer while it is rewarded: begins, and returns its end.
        self.beside: Callable[[RolloutBuffer], Callable[[], None]] | None = None
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
        # Of all ranks' rollouts that are kept.
        slots: list[int] = []
        of_all: list[tuple[Prompt, int, int]] = []  # prompt, response tokens, home
        for turn in range(rounds):
            first_sample = (number * rounds + turn) * size  # no sample is drawn twice
            buffer = self._generate(prompts, first_sample, on_tokens)
            self._reward(buffer)
            kept = self._worth_learning(buffer, size)[: size - len(slots)]
            parts.append(buffer if len(kept) == size else self._only(buffer, kept, len(slots)))
            slots += [turn * size + place for place in kept]
            assert buffer.homes is not None
            known = list(zip(prompts, buffer.lengths_of_all, buffer.homes.models))
            of_all += [known[place] for place in kept]
            if len(slots) == size or turn + 1 == rounds:
                break
            prompts = more() if more else prompts
        buffer = parts[0] if len(parts) == 1 else RolloutBuffer.joined(parts)
        buffer.slots = slots
        buffer.prompts_of_all = [prompt for prompt, *_ in of_all]
        buffer.lengths_of_all = [length for _, length, _ in of_all]
        buffer.homes = Homes(self.parallel.layout, tuple(home for *_, home in of_all))
        return buffer

    def _generate(
        self,
        prompts: list[Prompt],
        first_sample: int,
        on_tokens: OnTokens | None,
    ) -> RolloutBuffer:
        # Samples of one prompt stay on one rank, where there are prompts for all ranks: the prompt
        # is prefilled once.
        samples, division = self.settings.samples_per_prompt, self.engine.parallel
        models = division.layout.models
        unit = samples if len(prompts) // samples >= models else 1
        homes = Homes(division.layout, tuple(i // unit % models for i in range(len(prompts))))
        places = homes.places(division.rank)
        local_prompts = [prompts[i] for i in places]
        masks: dict[str, Any] = {"keep_masks": True} if self.settings.replay_mask else {}

        # A change of layout is part of generating, and also named by itself.
        with self.stage.at_work("policy"), self.timer("generate"), division.active():
            completions = self.engine.generate(
                [prompt.tokens for prompt in local_prompts],
                self.sampling,
                self.stop_ids,
                [first_sample + i for i in places],
                on_tokens,
                **masks,
            )

        keeps_masks = bool(masks) and self.sampling.leaves_out
        known = local_prompts, completions, places, division.device, keeps_masks
        buffer = RolloutBuffer.of(*known)
        buffer.homes, buffer.prompts_of_all = homes, prompts
        lengths = by_place(buffer.response_lengths, places, len(prompts), division)
        buffer.lengths_of_all = [int(n) for n in lengths]
        # From those who generated it to those who learn from it.
        return buffer.on(self.parallel)

    @torch.no_grad()
    def _reward(self, buffer: RolloutBuffer) -> None:
        """The components of the reward, and their weighted sum, [B] each.

        A component without an opinion adds nothing to the sum.
        """
        names = ("reward",) if self.beside is None else ("reward", "reference")
        with self.stage.at_work(*names), self.timer("reward"):
            finish = None if self.beside is None else self.beside(buffer)
            buffer.components, buffer.scores, buffer.rewarded = earned(self.rewards, buffer)
            if finish is not None:
                finish()
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
