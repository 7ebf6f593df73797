"""Whole PPO iterations on the ranks that started it; the results are asserted on by pytest.

    torchrun --nproc_per_node N tests/ppo/worker.py FOLDER MP_SIZE [MP_SIZE ...]

FOLDER holds the models `policy`, `reference`, `value` and `verifier`; FOLDER/N-MP.pt gets the results of each division.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from src.evaluation.tasks import find_task
from src.generation.engine import Engine
from src.generation.sampling import Sampling
from src.parallel.setup import Parallel, start, stop
from src.ppo import trainer
from src.ppo.buffer import Prompt
from src.ppo.rewards import RuleReward, VerifierReward
from src.ppo.roles import Role, Stage
from src.ppo.settings import PPOSettings
from src.ppo.trainer import PPO, KLController
from src.trainer.optimizer import Optimizer
from tests.trainer.tiny import ours, some_sequences, whole_weights

STOPS = set(range(2, 12))  # a random model ends about one response in ten tokens
TEMPERATURE, MAX_NEW_TOKENS, NUMBER = 0.7, 8, 3
LR, VALUE_LR, MAX_GRAD_NORM = 5e-3, 1e-2, 1.0
WEIGHTS = {"verifier": 0.5, "rule": 2.0}
KL_COEF = 0.3
PER_TOKEN = ("logprobs", "ref_logprobs", "entropy", "values", "rewards", "advantages", "returns", "rollout_logprobs")

RUNS = {
    "iteration": dict(max_batch_size=4, mini_batches=2, ppo_epochs=2),
    "micro-batches": dict(max_batch_size=1, mini_batches=2, ppo_epochs=2),
}


class Parity:
    """Reads any ids as "#### 0" or "#### 1"."""

    def decode(self, ids: list[int]) -> str:
        return f"#### {sum(ids) % 2}"


def prompts() -> list[Prompt]:
    """Four prompts, two samples of each, whose right answer is 0 or 1."""
    rows = [Prompt(s.tokens[: s.prompt_length], str(i % 2)) for i, s in enumerate(some_sequences(4, seed=9))]
    return [row for row in rows for _ in range(2)]


def make_ppo(
    folder: Path, parallel: Parallel, dtype=torch.float32, sampling: Sampling | None = None, offload: bool = False,
    value_mp: int | None = None, **settings,
) -> PPO:
    """The four roles, each another random model; two rewards. value_mp: ranks per value and per reward model."""
    settings = dict(max_batch_size=4, max_buffer_size=8, mini_batches=2, ppo_epochs=2, seed=11) | settings
    settings = PPOSettings(**settings)
    stage, divided = Stage(offload), parallel if value_mp is None else parallel.divided(value_mp)
    trained = {"policy": parallel} | ({"value": divided} if settings.has_value else {})
    for name, division in trained.items():
        model = ours(folder / name, division, dtype)
        stage.add(Role(name, model, division, Optimizer(model, division, max_grad_norm=MAX_GRAD_NORM, eps=1e-5)))
    for name, role in {"reference": "reference", "reward": "verifier"}.items():
        division = divided if name == "reward" else parallel
        stage.add(Role(name, ours(folder / role, division, dtype).requires_grad_(False), division))
    rewards = [
        (WEIGHTS["verifier"], VerifierReward(stage.roles["reward"], parallel, settings.max_batch_size)),
        (WEIGHTS["rule"], RuleReward(find_task("GSM8K"), Parity())),
    ]
    return PPO(
        stage, rewards, Engine(stage.roles["policy"].model, parallel, 5, 64),
        sampling or Sampling(MAX_NEW_TOKENS, TEMPERATURE, seed=4), STOPS, KLController(KL_COEF), settings, parallel,
    )


class Recorder:
    """Keeps a PPO's buffer, minibatches, loss calls and optimizer steps."""

    def __init__(self, ppo: PPO) -> None:
        self.ppo, self.buffer, self.minibatches, self.losses, self.steps = ppo, None, [], [], []
        update, plan, policy_loss = ppo._update, ppo._plan, ppo._policy_loss

        def keep_buffer(number, buffer, *rest):
            self.buffer, self.minibatches = buffer, []  # what was planned for scoring is planned again for epoch 0
            return update(number, buffer, *rest)

        def keep_plan(*arguments):
            found = plan(*arguments)
            self.minibatches += [[i for rows in minibatch.rows for i in rows] for minibatch in found]
            return found

        def keep_losses(*arguments):
            real = trainer.policy_loss

            def spy(logprobs, old_logprobs, *others):
                self.losses.append((len(self.steps), logprobs.detach().clone(), old_logprobs.clone()))
                return real(logprobs, old_logprobs, *others)

            trainer.policy_loss = spy
            try:
                return policy_loss(*arguments)
            finally:
                trainer.policy_loss = real

        ppo._update, ppo._plan, ppo._policy_loss = keep_buffer, keep_plan, keep_losses
        step = ppo.policy.optimizer.step

        def keep_step(lr):
            self.steps.append(lr)
            return step(lr)

        ppo.policy.optimizer.step = keep_step

    def ratio_starts_at_one(self) -> bool:
        """Bitwise, in every micro-batch before the first step; and not after it."""
        first = [torch.equal(new, old) for steps, new, old in self.losses if steps == 0]
        later = [torch.equal(new, old) for steps, new, old in self.losses if steps > 0]
        return all(first) and not any(later)

    def rollouts(self, parallel: Parallel) -> list[dict]:
        """What is known of every rollout, from all data-parallel ranks, in the prompts' order."""
        b, mine = self.buffer, []
        known = [n for n in PER_TOKEN if getattr(b, n) is not None]
        tokens, each = b.tokens.split(b.lengths), {n: getattr(b, n).split(b.response_lengths) for n in known}
        for i, prompt in enumerate(b.prompt_lengths):
            mine.append(
                {"prompt": tokens[i][:prompt].tolist(), "response": tokens[i][prompt:].tolist(),
                 "truncated": bool(b.truncated[i]), "score": float(b.scores[i]), "place": b.places[i],
                 **({} if b.last_values is None else {"last_value": float(b.last_values[i])}),
                 **{name: float(x[i]) for name, x in b.components.items()},
                 **{name: each[name][i].tolist() for name in known}}
            )
        every = [None] * parallel.dp_size
        dist.all_gather_object(every, mine, group=parallel.dp_group)
        return sorted((row for part in every for row in part), key=lambda row: row["place"])


def one_iteration(folder: Path, parallel: Parallel, **settings) -> dict:
    ppo = make_ppo(folder, parallel, **settings)
    recorder = Recorder(ppo)
    stats = ppo.iteration(NUMBER, prompts(), LR, VALUE_LR)
    plans = [None] * parallel.dp_size
    whole = [[recorder.buffer.places[i] for i in rows] for rows in recorder.minibatches]
    dist.all_gather_object(plans, whole, group=parallel.dp_group)
    ones = [None] * parallel.world_size
    dist.all_gather_object(ones, recorder.ratio_starts_at_one())
    return {
        "stats": stats,
        "rollouts": recorder.rollouts(parallel),
        "minibatches": [sorted(i for part in parts for i in part) for parts in zip(*plans)],
        "steps": len(recorder.steps),
        "ratio starts at one": ones,
        "policy": whole_weights(ppo.policy.model, parallel),
        "value": ppo.value and whole_weights(ppo.value.model, ppo.value.parallel),
    }


def all_checks(folder: Path, mp_sizes: list[int]) -> None:
    for mp_size in mp_sizes:
        parallel = start(mp_size, timeout=120)
        results = {name: one_iteration(folder, parallel, **settings) for name, settings in RUNS.items()}
        if parallel.is_main:
            torch.save(results, folder / f"{parallel.world_size}-{mp_size}.pt")
    stop()


if __name__ == "__main__":
    all_checks(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
