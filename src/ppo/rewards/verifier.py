"""The verifier's score as a reward."""

from collections.abc import Callable

import torch
from torch import Tensor

from src.data.tokenizer import Tokenizer
from src.errors import UserError
from src.models.batch import Batch, Sequence, micro_batches, sequence_scores
from src.parallel.setup import Parallel, agreed
from src.ppo.buffer import RolloutBuffer
from src.ppo.rewards import RewardInputs
from src.ppo.roles import Role
from src.trainer.passes import from_last_stage


class VerifierReward:
    """The scalar head's score at the response's last token.

    Centred and scaled by the numbers stored with the verifier. A verifier with another tokenizer
    reads the texts: the instruction as its own prompt, and the response.
    """

    name = "verifier"

    def __init__(
        self,
        role: Role,
        parallel: Parallel,
        max_batch_size: int,
        max_tokens: int | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        translate: Callable[[RolloutBuffer], list[Sequence]] | None = None,
    ) -> None:
        """parallel: of whose models the rollouts are; translate: them in the verifier's tokens."""
        self.role, self.parallel, self.limits = role, parallel, (max_batch_size, max_tokens)
        self.mean, self.std, self.translate = mean, std, translate

    @torch.no_grad()
    def __call__(self, buffer: RolloutBuffer) -> Tensor:
        device, view = buffer.tokens.device, buffer.on(self.role.parallel)
        sequences = self.translate(view) if self.translate else None
        lengths = view.lengths if sequences is None else [len(s.tokens) for s in sequences]
        scores = torch.zeros(len(view), device=device)  # [B]

        def batch_of(rows: list[int]) -> Batch:
            if sequences is None:
                return view.batch(rows)
            return Batch.of([sequences[i] for i in rows], device)

        def read(rows: list[int]) -> None:
            raw = sequence_scores(self.role.model, batch_of(rows))
            scores[rows] = (raw - self.mean) / self.std

        # Where the verifier is, and back to where the rollouts are.
        with self.role.parallel.active():
            self.role.passes.score(micro_batches(lengths, *self.limits), batch_of, read)
        view.scores = from_last_stage(scores, self.role.parallel)
        buffer.bring(view, self.parallel, "scores")
        agreed(lambda: _check_finite(buffer.scores))
        return buffer.scores


def _check_finite(scores: Tensor) -> None:
    broken = int((~scores.isfinite()).sum())
    if broken:
        raise UserError(
            f"--reward verifier: {broken} of {len(scores)} scores are not finite numbers: the "
            "verifier's weights are damaged, or its --dtype is too narrow for it"
        )


def translator(policy: Tokenizer, verifier: Tokenizer) -> Callable[[RolloutBuffer], list[Sequence]]:
    """From the policy's tokens to the verifier's, by way of the text.

    EOS stands where the policy ended by itself.
    """

    def translate(buffer: RolloutBuffer) -> list[Sequence]:
        sequences = []
        responses, truncated = buffer.responses(), buffer.truncated.tolist()
        for prompt, ids, is_cut in zip(buffer.prompts, responses, truncated):
            query = verifier.prompt_ids(prompt.row["instruction"])
            response = verifier.response_ids(policy.decode(ids), sampled=True, ended=not is_cut)
            sequences.append(Sequence(query + response, len(query)))
        return sequences

    return translate


def make(inputs: RewardInputs) -> VerifierReward:
    translate = None
    if inputs.verifier_tokenizer is not None:
        translate = translator(inputs.tokenizer, inputs.verifier_tokenizer)
    role, (mean, std) = inputs.stage.roles["reward"], inputs.moments or (0.0, 1.0)
    limits = inputs.settings.batches.limits
    return VerifierReward(role, inputs.parallel, *limits, mean, std, translate)
