"""Online preference learning: pairs of the policy's own samples, ranked by a judge at each step."""

from typing import Any

from src.data.encoding import Comparison, Prompt
from src.generation.engine import Completion
from src.models.batch import Sequence
from src.models.transformer import Transformer, evaluating
from src.parallel.clock import clock
from src.ppo.judge import Judge
from src.trainer.preference import PreferenceObjective, Row
from src.trainer.sampling import Sample


class OnlineObjective(PreferenceObjective):
    """Rows are prompts, whose responses are sampled when their step begins.

    The best of a prompt's samples is compared with the worst; samples that all earn the same give
    no pair, and the prompt is left out of that step.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        samples: int,
        rows_per_step: int,
        sample: Sample,
        judge: Judge,
        **options: Any,
    ) -> None:
        """samples: of each prompt; options: `PreferenceObjective`'s, but for the rows."""
        # Until it is sampled a row is its prompt, twice.
        unknown = [Sequence(prompt.tokens, len(prompt.tokens)) for prompt in prompts]
        super().__init__([Comparison([s, s], [(0, 1)]) for s in unknown], **options)
        self.prompts, self.samples, self.rows_per_step = prompts, samples, rows_per_step
        self.sample, self.judge = sample, judge
        self.held = (*self.held, *judge.held)

    def begin(self, number: int, batch: list[int], model: Transformer) -> None:
        # Samples of one prompt side by side; none is drawn twice, and resuming draws the same.
        prompts = [self.prompts[i] for i in batch for _ in range(self.samples)]
        first = number * self.rows_per_step * self.samples
        numbers = [first + i for i in range(len(prompts))]
        with clock.phase("generate"), evaluating(model):
            completions = self.sample([prompt.tokens for prompt in prompts], numbers)
        with clock.phase("judge"):
            scores = self.judge(prompts, completions)

        # Each prompt's best against its worst.
        for place, i in enumerate(batch):
            of_prompt = slice(place * self.samples, (place + 1) * self.samples)
            row = best_and_worst(self.prompts[i], completions[of_prompt], scores[of_prompt])
            self.weights[i] = int(row is not None)
            if row is not None:
                self.rows[i] = Row.of(row)
            of_row = self.rows[i].responses if row is not None else []
            self.lengths[i] = sum(length for length, _ in self.pieces(i)) if of_row else 0
            self.needed[i] = sum(s.response_length for s in of_row)
        paired = [i for i in batch if self.weights[i]]
        super().begin(number, paired, model)
        known = [x for x in scores if x is not None]
        tokens = sum(len(completion.tokens) for completion in completions)
        self.noted = {
            "score": sum(known) / max(1, len(known)),
            "pairs": len(paired) / len(batch),
            "response_length": tokens / len(completions),
            "generated_tokens": tokens,
        }


def best_and_worst(
    prompt: Prompt, completions: list[Completion], scores: list[float | None]
) -> Comparison | None:
    """The sample with the highest score above the one with the lowest; None: all earn the same.

    The first of those that are equal; samples without a score do not count.
    """
    known = [(x, place) for place, x in enumerate(scores) if x is not None]
    if not known:
        return None
    (high, first), (low, second) = max(known, key=lambda k: k[0]), min(known, key=lambda k: k[0])
    best, worst = (
        Sequence([*prompt.tokens, *completions[place].tokens], len(prompt.tokens))
        for place in (first, second)
    )
    return (
        None if high == low or best.tokens == worst.tokens else Comparison([best, worst], [(0, 1)])
    )
