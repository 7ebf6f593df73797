"""What scores samples outside PPO: the same rewards, for choosing among a prompt's samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from src.checkpoint.load import load_model
from src.checkpoint.save import read_score_moments
from src.data.encoding import Prompt, gold_of, ppo_prompts
from src.data.sources import Named
from src.data.tokenizer import Tokenizer
from src.evaluation.tasks import Task, find_task
from src.generation.engine import Completion
from src.inputs import (
    OpenedModel,
    open_model,
    read_alike,
    same_tokenizer,
    verifier_tokenizer,
)
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.ppo.buffer import RolloutBuffer, by_place
from src.ppo.rewards import Reward, RewardedSettings, RewardInputs, earned, make_rewards
from src.ppo.rewards.file import UserScore, load_score
from src.ppo.roles import Role, Stage
from src.settings.model import TextModelSettings
from src.settings.rewards import JudgeSettings


class JudgedSettings(RewardedSettings, Protocol):
    """The settings of a script whose samples are scored."""

    @property
    def model(self) -> TextModelSettings: ...

    @property
    def judge(self) -> JudgeSettings: ...


class RuleSettings(Protocol):
    """Whose rule is applied."""

    @property
    def task(self) -> str | None: ...

    @property
    def rule(self) -> str | None: ...


@dataclass(frozen=True)
class OpenedJudge:
    """What the rewards need, looked through but not loaded.

    tokenizer: the solver's; moments: of the verifier's scores.
    """

    settings: JudgedSettings
    tokenizer: Tokenizer
    verifier: OpenedModel | None
    moments: tuple[float, float] | None
    rule: Task | None
    score: UserScore | None

    @classmethod
    def read(
        cls,
        settings: JudgedSettings,
        rule: RuleSettings,
        tokenizer: Tokenizer,
        parallel: Parallel,
    ) -> "OpenedJudge":
        """Open what --reward names. Raises UserError, before any work, for whatever is wrong."""
        names, folder = settings.rewards.names, settings.judge.reward_model_ckpt_dir
        verifier = moments = task = score = None
        if folder is not None:
            model, own = settings.model, settings.judge.reward_tokenizer_file
            source = read_alike(model, folder, verifier_tokenizer(folder, own, tokenizer))
            verifier = open_model(source, parallel, head="score", chat_family=model.model_type)
            moments = read_score_moments(Path(folder))
        if "rule" in names:
            task = find_task(rule.task or "GSM8K", rule.rule)
        if (where := settings.rewards.reward_file) is not None:
            score = UserScore(where, load_score(where))
        return cls(settings, tokenizer, verifier, moments, task, score)

    def prompts(
        self, path: Named, tokenizer: Tokenizer, max_seq_len: int
    ) -> tuple[list[Prompt], list[str]]:
        """A file's prompts, with what the rewards need of its rows; and notes."""
        prompts, notes = ppo_prompts(
            path, tokenizer, self.rule, max_seq_len, self.score is not None
        )
        if self.score is not None and torch.distributed.get_rank() == 0:
            self.score.try_out(prompts[0].row)
        return prompts, notes

    def asked(self, rows: list[dict], prompts: list[list[int]], path: str) -> list[Prompt]:
        """Rows' prompts, whose ids are given, with what the rewards need.

        Raises UserError for a row whose right answer is needed and cannot be read. path: the
        rows' file.
        """
        found = []
        for number, (row, ids) in enumerate(zip(rows, prompts)):
            gold = gold_of(self.rule, row, f"{path}: row {number} (from 0)")
            found.append(Prompt(ids, gold, row))
        if self.score is not None and torch.distributed.get_rank() == 0:
            self.score.try_out(rows[0])
        return found

    def load(self, parallel: Parallel, dtype: torch.dtype, streamed: bool = False) -> "Judge":
        """With the verifier in memory, where there is one. streamed: see `load_model`."""
        stage = Stage(False, parallel.device)
        if self.verifier is not None:
            source = self.verifier.checkpoint
            model = load_model(source, parallel, dtype, "score", streamed=streamed)
            stage.add(Role("reward", model.eval().requires_grad_(False), parallel))
        other = None
        if self.verifier and not same_tokenizer(self.tokenizer, self.verifier.tokenizer):
            other = self.verifier.tokenizer
        inputs = RewardInputs(
            self.settings, parallel, stage, self.tokenizer, other, self.moments, self.rule
        )
        held = [role.model for role in stage.roles.values()]
        return Judge(make_rewards(inputs), parallel, held)


class Judge:
    """Scores samples by the weighted sum of some rewards."""

    def __init__(
        self,
        rewards: list[tuple[float, Reward]],
        parallel: Parallel,
        held: Sequence[Transformer] = (),
    ) -> None:
        """held: the models that lie on the device for it."""
        self.rewards, self.parallel, self.held = rewards, parallel, held

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], completions: list[Completion]) -> list[float | None]:
        """A score for each completion, the same on all ranks; None: no reward has an opinion.

        prompts: of each completion. All ranks give the same, and each scores its share.
        """
        p = self.parallel
        places = list(range(p.dp_rank, len(completions), p.dp_size))
        own = [prompts[i] for i in places], [completions[i] for i in places]
        _, scores, known = earned(self.rewards, RolloutBuffer.of(*own, places, p.device))
        sums = by_place(scores, places, len(completions), p).tolist()
        has_score = by_place(known.double(), places, len(completions), p).tolist()
        return [x if is_known else None for x, is_known in zip(sums, has_score)]
