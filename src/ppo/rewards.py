"""What a response earns: the verifier's score, a rule's verdict, or their weighted sum."""

import torch
from torch import Tensor

from src.data.tokenizer import Tokenizer
from src.evaluation.solver import cut_at
from src.evaluation.tasks import Task
from src.models.batch import sequence_scores
from src.models.transformer import Transformer
from src.ppo.buffer import RolloutBuffer


class VerifierReward:
    """The scalar head's score at the response's last token."""

    name = "verifier"

    def __init__(self, model: Transformer) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, buffer: RolloutBuffer, micro_batches: list[list[int]], golds: list[str]) -> Tensor:
        """buffer of B rollouts → [B]; golds: each prompt's right answer."""
        scores = torch.zeros(len(buffer), device=buffer.tokens.device)
        for rows in micro_batches:
            batch, _ = buffer.select(rows)
            scores[rows] = sequence_scores(self.model, batch)
        return scores


class RuleReward:
    """1 when the task's grader finds the answer right, else 0 (a reward of 0 is a reward)."""

    name = "rule"

    def __init__(self, task: Task, tokenizer: Tokenizer) -> None:
        self.task, self.tokenizer = task, tokenizer

    def __call__(self, buffer: RolloutBuffer, micro_batches: list[list[int]], golds: list[str]) -> Tensor:
        tokens = buffer.tokens.split(buffer.lengths)
        texts = [self.tokenizer.decode(t[p:].tolist()) for t, p in zip(tokens, buffer.prompt_lengths)]
        texts = [cut_at(text, self.task.stop) for text in texts]  # as the evaluation reads them
        right = [self.task.grade(text, gold)[self.task.metric] for text, gold in zip(texts, golds)]
        return torch.tensor(right, dtype=torch.float32, device=buffer.tokens.device)
