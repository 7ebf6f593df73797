"""Whole PPO iterations on the ranks that started it; the results are asserted on by pytest.

    torchrun --nproc_per_node N tests/ppo/worker.py FOLDER MP_SIZE [MP_SIZE ...]

FOLDER holds the models `policy`, `reference`, `value` and `verifier`, and adapters on `policy`:
`policy adapter`, `value adapter`, `verifier adapter`; FOLDER/N-MP.pt gets the results of each
division. MP_SIZE:STAGES makes a pipeline, for what is in `IN_STAGES`: N-MP-STAGES.pt.
"""

import hashlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from src.checkpoint.adapter import Adapter
from src.checkpoint.load import load_model, load_sharing
from src.checkpoint.source import Checkpoint
from src.data.encoding import Prompt
from src.evaluation.tasks import find_task
from src.generation.engine import Engine
from src.generation.relayout import RelaidEngine
from src.generation.sampling import Sampling
from src.models.batch import Batch, response_logprobs, response_values, sequence_scores
from src.models.exchange import is_spread
from src.models.transformer import Transformer
from src.parallel.setup import Parallel, start, stop
from src.ppo import trainer
from src.ppo.dump import RolloutDump
from src.ppo.kl import KLController
from src.ppo.layouts import Layouts
from src.ppo.pretraining import PretrainingMix
from src.ppo.rewards.rule import RuleReward
from src.ppo.rewards.verifier import VerifierReward
from src.ppo.roles import Role, Stage
from src.ppo.trainer import PPO
from src.settings.declaration import build
from src.settings.ppo import LayoutSettings, PPOSettings
from src.settings.run import TrainingRunSettings
from src.trainer.averages import PLAIN, Method
from src.trainer.optimizer import Optimizer
from tests.trainer.tiny import ours, some_sequences, whole_weights

CHOICE = ("max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p")
STOPS = frozenset(range(2, 12))  # a random model ends about one response in ten tokens
TEMPERATURE, MAX_NEW_TOKENS, NUMBER = 0.7, 8, 3
LR, VALUE_LR, MAX_GRAD_NORM = 5e-3, 1e-2, 1.0
WEIGHTS = {"verifier": 0.5, "rule": 2.0}
KL_COEF = 0.3
PTX_ROWS, PTX_BATCH = 5, 3
PER_TOKEN = (
    "logprobs",
    "ref_logprobs",
    "entropy",
    "values",
    "rewards",
    "advantages",
    "returns",
    "rollout_logprobs",
    "old_values",
    "value_targets",
)


@dataclass(frozen=True)
class Run:
    """One PPO: settings that differ from `make_ppo`'s, and what else does.

    State: what an earlier run left, of policy and

    value; worth: of each round of prompts, the reward of each sample, instead of the two rewards.
    """

    settings: dict = field(default_factory=dict)
    sampling: Sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE, seed=4)
    stops: frozenset = STOPS
    iterations: int = 1
    offload: bool = False
    layouts: dict[str, str] = field(default_factory=dict)
    zero: int = 1
    sequence_parallel: bool = False
    method: Method = PLAIN
    state: tuple[dict, dict] = ({}, {})
    worth: tuple[tuple[float, ...], ...] = ()


def _sampling(**change) -> Sampling:
    return Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE, seed=4, **change)


NONE = float("nan")  # no opinion
SILENT = (1, NONE, 0, 0.5, NONE, NONE, 0.25, 2)
ONCE = dict(ppo_epochs=1)
PAIRS = dict(ppo_epochs=1, samples_per_prompt=2)
RUNS = {
    "iteration": Run(),
    "micro-batches": Run(dict(max_batch_size=1)),
    "grpo": Run(PAIRS | dict(advantage="grpo")),
    "dr_grpo": Run(PAIRS | dict(advantage="dr_grpo", max_batch_size=1)),
    "rloo": Run(PAIRS | dict(advantage="rloo")),
    "reinforce++": Run(ONCE | dict(advantage="reinforce++", gamma=0.9)),
    "k2, entropy": Run(ONCE | dict(kl="k2", entropy_coef=0.05, max_batch_size=2)),
    "k3, by sequence": Run(ONCE | dict(kl="k3", loss_level="sequence", max_tokens_per_batch=20)),
    "constant": Run(ONCE | dict(loss_level="constant", whiten=False, max_batch_size=3)),
    "clips": Run(dict(cliprange=0.1, cliprange_high=0.5, dual_clip=1.1)),
    "value ranges": Run(
        ONCE | dict(cliprange_value=0.05, vf_coef=0.5, gamma=0.9, lam=0.8, lam_critic=0.6)
    ),
    "value_norm": Run(
        ONCE | dict(value_norm=True), state=({}, {"value_moments": [20.0, 30.0, 125.0]})
    ),
    "reward_norm": Run(
        ONCE | dict(reward_norm=True, reward_scale=1.5, reward_bias=0.1, reward_clip=1.0),
        state=({"reward_moments": [10.0, 4.0, 20.0]}, {}),
    ),
    "zero": Run(ONCE | dict(truncated="zero")),
    "penalty": Run(ONCE | dict(truncated="penalty", truncation_penalty=0.7)),
    "value_mp": Run(ONCE | dict(max_batch_size=1), layouts=dict(critic_train="tp1", rew_inf="tp1")),
    "top_k": Run(ONCE | dict(replay_mask=True), _sampling(top_k=5)),
    "top_p, min_new_tokens": Run(
        ONCE | dict(replay_mask=True, entropy_coef=0.05), _sampling(top_p=0.8, min_new_tokens=3)
    ),
    "whole softmax": Run(ONCE, _sampling(top_k=5)),
    "target_kl": Run(dict(target_kl=0.25)),  # the second of four steps comes to 0.31
    "critic_warmup": Run(ONCE | dict(critic_warmup=NUMBER + 1)),
    "after critic_warmup": Run(ONCE | dict(critic_warmup=NUMBER, advantage="gae")),
    "ref_ema": Run(ONCE | dict(ref_ema=0.7)),
    "ptx": Run(ONCE | dict(ptx_coef=0.4, max_batch_size=2)),
    "first-token ends": Run(
        ONCE, Sampling(max_new_tokens=3, temperature=1.0, seed=4), frozenset(range(2, 34))
    ),
    "filter": Run(
        PAIRS | dict(advantage="grpo", filter_rounds=3),
        worth=(
            (1, 1, 0, 1, 0, 0, 0.5, 0),
            (1, 0, 0.25, 0.25, 0, 1, 2, 0),
            (5, 6, 7, 8, 9, 10, 11, 12),
        ),
    ),
    "filter, one group": Run(
        PAIRS | dict(filter_rounds=1, whiten=False), worth=((1, 1, 0, 0, 1, 0, 1, 1),)
    ),
    "filter, nothing": Run(PAIRS | dict(filter_rounds=2), worth=((1, 1, 0, 0, 1, 1, 0, 0),) * 2),
    "no opinion": Run(PAIRS | dict(advantage="grpo"), worth=(SILENT,)),
    "no opinion, no groups": Run(ONCE | dict(reward_norm=True), worth=(SILENT,)),
    "no opinion, filter": Run(
        PAIRS | dict(advantage="rloo", filter_rounds=2),
        worth=((1, NONE, 0, 0.5, NONE, NONE, 2, 2), (1, 0, 3, NONE, NONE, NONE, 0.25, 2)),
    ),
    "zero 3": Run(zero=3, sequence_parallel=True),
    "zero 2, micro-batches, ptx, ref_ema": Run(
        ONCE | dict(max_batch_size=1, ptx_coef=0.4, ref_ema=0.7), zero=2
    ),
    "sequence parallel": Run(ONCE | dict(max_batch_size=2), sequence_parallel=True),
    "zero 3, offloaded": Run(offload=True, zero=3),
    "offloaded, updated on the CPU": Run(offload=True, method=Method(offload=True, on_cpu=True)),
    "twice": Run(ONCE, iterations=2),
    "twice, in turn, offloaded": Run(ONCE | dict(update="in_turn"), iterations=2, offload=True),
}
# At degree 4, which differs from 2 in how layers and vocabulary are cut, only what depends on that.
AT_FOUR = (
    "iteration",
    "micro-batches",
    "grpo",
    "k2, entropy",
    "k3, by sequence",
    "constant",
    "value_mp",
    "top_k",
    "top_p, min_new_tokens",
    "ptx",
    "sequence parallel",
    "filter, one group",
    "filter, nothing",
    "twice",
    "twice, in turn, offloaded",
)

# Where ranks are stages of a pipeline.
IN_STAGES = (
    "iteration",
    "micro-batches",
    "grpo",
    "k2, entropy",
    "k3, by sequence",
    "value_norm",
    "ref_ema",
    "ptx",
    "filter, one group",
    "filter, nothing",
    "critic_warmup",
    "after critic_warmup",
    "sequence parallel",
    "twice",
    "twice, in turn, offloaded",
)


def runs_at(run: str, mp_size: int, stages: int) -> bool:
    """Whether a run is one of a division."""
    if stages > 1:
        return run in IN_STAGES
    return mp_size < 4 or run in AT_FOUR


class Parity:
    """Reads any ids as "#### 0" or "#### 1"."""

    def decode(self, ids: list[int]) -> str:
        return f"#### {sum(ids) % 2}"


class Worth:
    """A reward that is written beside each sample."""

    name = "worth"

    def __call__(self, buffer) -> torch.Tensor:
        return torch.tensor([float(prompt.row["worth"]) for prompt in buffer.prompts])


def prompts(worth: tuple[float, ...] = (0.0,) * 8) -> list[Prompt]:
    """Four prompts, two samples of each, whose right answer is 0 or 1."""
    rows = [
        Prompt(s.tokens[: s.prompt_length], str(i % 2))
        for i, s in enumerate(some_sequences(4, seed=9))
    ]
    return [
        Prompt(row.tokens, row.gold, {"worth": x})
        for row, x in zip([row for row in rows for _ in range(2)], worth)
    ]


def ptx_rows():
    return some_sequences(PTX_ROWS, seed=21)


def make_ppo(
    folder: Path,
    parallel: Parallel,
    dtype=torch.float32,
    sampling: Sampling | None = None,
    offload: bool = False,
    layouts: dict[str, str] | None = None,
    zero: int = 1,
    sequence_parallel: bool = False,
    method: Method = PLAIN,
    **flags,
) -> PPO:
    """The four roles, each another random model; two rewards.

    layouts: of roles and phases, as the script's flags say; else as `parallel` is.
    """
    given = layouts or {}
    layout = replace(parallel.layout, zero=zero, sp=sequence_parallel and parallel.mp_size > 1)
    where = Layouts.of(
        LayoutSettings(**{"actor_train": str(layout)} | given),
        TrainingRunSettings(),
        8,
        parallel.world_size,
    )
    parallel = parallel.laid_out(where.actor_train)
    sampling = sampling or Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE, seed=4)
    settings = ppo_settings(**{name: getattr(sampling, name) for name in CHOICE}, **flags)
    stage = Stage(offload, parallel.device)
    trained = {"policy": parallel}
    if settings.advantages.has_value:
        trained["value"] = parallel.laid_out(where.critic_train)
    for name, division in trained.items():
        of = division.layout
        model = ours(folder / name, division, dtype, zero=of.zero, stages_per_rank=of.vp)
        model.sequence_parallel = of.sp
        options = dict(max_grad_norm=MAX_GRAD_NORM, eps=1e-5, zero=of.zero, method=method)
        stage.add(Role(name, model, division, Optimizer(model, division, **options)))
    frozen = {"reference": where.ref_inf, "reward": where.rew_inf}
    for name, role in {"reference": "reference", "reward": "verifier"}.items():
        division = parallel.laid_out(frozen[name])
        stage.add(Role(name, ours(folder / role, division, dtype).requires_grad_(False), division))
    rewards = [
        (
            WEIGHTS["verifier"],
            VerifierReward(stage.roles["reward"], parallel, settings.batches.max_batch_size),
        ),
        (WEIGHTS["rule"], RuleReward(find_task("GSM8K"), Parity())),
    ]
    ptx = (
        PretrainingMix(ptx_rows(), PTX_BATCH, settings, parallel.device)
        if settings.pretraining.ptx_coef
        else None
    )
    policy, limits = stage.roles["policy"].model, (5, 64)
    relaid = is_spread(policy) or not where.actor_gen.is_like(where.actor_train)
    own = RelaidEngine(policy, parallel, where.actor_gen, *limits) if relaid else None
    is_value_there = where.critic_inf.is_like(where.critic_train)
    return PPO(
        stage,
        rewards,
        own or Engine(policy, parallel, *limits),
        sampling,
        STOPS,
        KLController(KL_COEF),
        settings,
        parallel,
        ptx,
        None if is_value_there else where.critic_inf,
    )


def ppo_settings(**flags) -> PPOSettings:
    """As the runs here have it, but for these."""
    small = dict(max_batch_size=4, max_buffer_size=8, mini_batches=2, ppo_epochs=2, seed=11)
    mixed = {"ptx_file": "-"} if flags.get("ptx_coef") else {}
    return build(PPOSettings, small | mixed | flags)


class Recorder:
    """Keeps a PPO's buffer, minibatches, loss calls and the policy's optimizer steps."""

    def __init__(self, ppo: PPO) -> None:
        self.ppo, self.buffer, self.minibatches, self.losses, self.steps = ppo, None, [], [], []
        update, plan, policy_loss = ppo._update, ppo._plan, ppo._policy_loss

        def keep_buffer(number, buffer, *rest):
            # What was planned for scoring is planned again for epoch 0.
            self.buffer, self.minibatches = buffer, []
            return update(number, buffer, *rest)

        def keep_plan(number, epoch, buffer):
            found = plan(number, epoch, buffer)
            if buffer is self.buffer:  # not where a value model of another layout has the rollouts
                self.minibatches += [
                    [i for rows in minibatch.rows for i in rows] for minibatch in found
                ]
            return found

        def keep_losses(*arguments):
            real = trainer.policy_loss

            def spy(logprobs, old_logprobs, *others):
                self.losses.append(
                    (len(self.steps), logprobs.detach().clone(), old_logprobs.clone())
                )
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
        tokens, each = (
            b.tokens.split(b.lengths),
            {n: getattr(b, n).split(b.response_lengths) for n in known},
        )
        for i, prompt in enumerate(b.prompt_lengths):
            mine.append(
                {
                    "prompt": tokens[i][:prompt].tolist(),
                    "response": tokens[i][prompt:].tolist(),
                    "truncated": bool(b.truncated[i]),
                    "score": float(b.scores[i]),
                    "place": b.places[i],
                    **({} if b.shaped is None else {"shaped": float(b.shaped[i])}),
                    **({} if b.last_values is None else {"last_value": float(b.last_values[i])}),
                    **{name: float(x[i]) for name, x in b.components.items()},
                    **{name: each[name][i].tolist() for name in known},
                }
            )
        every = everyones(mine if parallel.speaks else [])
        return sorted((row for part in every for row in part), key=lambda row: row["place"])


class Remembered:
    """The first completions of an engine, kept for the next PPO.

    It starts from the same policy and asks the same.
    """

    known: dict = {}

    def __init__(self, engine: Engine) -> None:
        self.engine, self.parallel, self.fresh = engine, engine.parallel, True

    def generate(self, prompts, sampling, stops, samples, on_tokens, **masks):
        key = str((self.engine.parallel.mp_size, prompts, sampling, sorted(stops), samples, masks))
        first, self.fresh = self.fresh, False
        if first and key in self.known:
            return self.known[key]
        found = self.engine.generate(prompts, sampling, stops, samples, on_tokens, **masks)
        if first:
            self.known[key] = found
        return found


def adapted(folder: Path, parallel: Parallel, shared: bool) -> dict[str, Transformer]:
    """The roles as adapters on `policy`.

    On one trunk, or each on weights of its own (the frozen ones merged).
    """

    def opened(adapter: str | None) -> Checkpoint:
        return Checkpoint.open(
            str(folder / "policy"), adapter_dir=adapter and str(folder / adapter)
        )

    def adapter(name: str) -> Adapter:
        return Adapter.open(str(folder / name), opened(None).config)

    fp32 = (parallel, torch.float32)
    policy = load_model(opened("policy adapter"), *fp32, "lm", lora=adapter("policy adapter").lora)
    if shared:
        reference = load_sharing(policy, parallel, "lm")
        adapters = [adapter(f"{name} adapter") for name in ("value", "verifier")]
        value, reward = (load_sharing(policy, parallel, "score", adapter=each) for each in adapters)
    else:
        reference = load_model(opened(None), *fp32, "lm")
        value = load_model(
            opened("value adapter"), *fp32, "score", lora=adapter("value adapter").lora
        )
        reward = load_model(opened("verifier adapter"), *fp32, "score")
    for frozen in (reference, reward):
        frozen.requires_grad_(False)
    return {"policy": policy, "reference": reference, "value": value, "reward": reward}


@torch.no_grad()
def outputs(models: dict[str, Transformer], parallel: Parallel) -> dict[str, torch.Tensor]:
    """Of some sequences, by each role."""
    batch = Batch.of(some_sequences(5, seed=2), parallel.device)
    found = {
        name: response_logprobs(models[name], batch, TEMPERATURE)[0]
        for name in ("policy", "reference")
    }
    found["value"] = torch.cat(response_values(models["value"], batch))
    return found | {"reward": sequence_scores(models["reward"], batch)}


def adapters_run(folder: Path, parallel: Parallel, shared: bool, offload: bool = False) -> dict:
    models, settings = (
        adapted(folder, parallel, shared),
        ppo_settings(),
    )
    before, stage = outputs(models, parallel), Stage(offload, parallel.device)
    places = {name: {p.data_ptr() for p in model.parameters()} for name, model in models.items()}
    trained = {
        name: [n for n, p in model.named_parameters() if p.requires_grad]
        for name, model in models.items()
    }
    for name, model in models.items():
        options = dict(max_grad_norm=MAX_GRAD_NORM, eps=1e-5)
        stage.add(
            Role(
                name,
                model,
                parallel,
                Optimizer(model, parallel, **options) if trained[name] else None,
            )
        )
    rewards = [(1.0, VerifierReward(stage.roles["reward"], parallel, 4))]
    engine = Engine(models["policy"], parallel, 5, 64)
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE, seed=4)
    ppo = PPO(stage, rewards, engine, sampling, STOPS, KLController(KL_COEF), settings, parallel)
    recorder = Recorder(ppo)
    stats = ppo.iteration(NUMBER, prompts(), LR, VALUE_LR)
    with stage.at_work(*models):
        after = outputs(models, parallel)
    return {
        "stats": stats,
        "before": before,
        "after": after,
        "rollouts": recorder.rollouts(parallel),
        "places": places,
        "trained": trained,
        "peak": dict(stage.peak),
        "policy": whole(ppo, "policy"),
        "value": whole(ppo, "value"),
        "digests": everyones(digest(ppo)),
    }


def everyones(x, group=None) -> list:
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, x, group=group)
    return found


def digest(ppo: PPO) -> str:
    """Of every bit of the roles' weights and of the optimizers' state on this rank."""
    found = hashlib.sha256()
    with ppo.stage.at_work(*ppo.stage.roles, training=True):
        for role in ppo.stage.roles.values():
            for tensor in role.weights() + role.state():
                found.update(
                    tensor.detach().clone().view(-1).view(torch.uint8).numpy().tobytes()
                )  # a copy: numpy keeps it
    return found.hexdigest()


def whole(ppo: PPO, name: str) -> dict | None:
    """All weights of a role."""
    role = ppo.stage.roles.get(name)
    if role is None:
        return None
    with ppo.stage.at_work(name), role.parallel.active():
        return whole_weights(role.model, role.parallel)


def spelled(ids: list[int]) -> str:
    """A text for ids that have none."""
    return " ".join(map(str, ids))


def one_run(folder: Path, parallel: Parallel, run: Run, dump: str | None = None) -> dict:
    ppo = make_ppo(
        folder,
        parallel,
        sampling=run.sampling,
        offload=run.offload,
        layouts=run.layouts,
        zero=run.zero,
        sequence_parallel=run.sequence_parallel,
        method=run.method,
        **run.settings,
    )
    ppo.rollouts.stop_ids = run.stops
    if run.worth:
        ppo.rollouts.rewards = [(1.0, Worth())]
    if not run.offload:
        ppo.rollouts.engine = Remembered(ppo.rollouts.engine)
    if dump is not None:
        tokenizer = SimpleNamespace(decode=spelled, spelled=spelled)
        ppo.watch.append(RolloutDump(dump, tokenizer, parallel))
    ppo.state.take_up(*run.state)
    recorder, mixed = Recorder(ppo), []
    if ppo.state.mix:
        batches = ppo.state.mix.batches
        batches._batches = (mixed.append(rows) or rows for rows in batches._batches)
    rounds = iter(run.worth)
    for number in range(NUMBER, NUMBER + run.iterations):
        recorder.steps.clear()
        batch = prompts(next(rounds)) if run.worth else prompts()
        stats = ppo.iteration(number, batch, LR, VALUE_LR, more=lambda: prompts(next(rounds)))
    result = {
        "stats": stats,
        "steps": len(recorder.steps),
        "state": ppo.state.beside_weights(),
        "digests": everyones(digest(ppo)),
        **{name: whole(ppo, name) for name in ("policy", "value", "reference")},
        "ptx": mixed,
        "rounds left": len(list(rounds)),
    }
    if recorder.buffer is None:
        return result
    places = [[recorder.buffer.places[i] for i in rows] for rows in recorder.minibatches]
    return result | {
        "rollouts": recorder.rollouts(parallel),
        "rows of each rank": everyones(len(recorder.buffer)),
        "minibatches": [
            sorted(i for part in parts for i in part)
            for parts in zip(*everyones(places, parallel.dp_group))
        ],
        "ratio starts at one": everyones(recorder.ratio_starts_at_one()),
    }


def all_checks(folder: Path, divisions: list[tuple[int, int]]) -> None:
    """divisions: (ranks that share tensors, stages) of each."""
    for mp_size, stages in divisions:
        parallel = start(mp_size, timeout=120, pipeline_parallel_size=stages)
        name = f"{parallel.world_size}-{mp_size}" + (f"-{stages}" if stages > 1 else "")
        torch.set_num_threads(1)  # tensors this small only wait for more
        Remembered.known.clear()
        results = {
            run: one_run(
                folder, parallel, what, str(folder / f"dump {name}") if run == "iteration" else None
            )
            for run, what in RUNS.items()
            if runs_at(run, mp_size, stages)
        }
        if parallel.world_size < 4 and stages == 1:
            results["separate"] = adapters_run(folder, parallel, shared=False)
            results["shared"] = adapters_run(folder, parallel, shared=True)
            results["shared, offloaded"] = adapters_run(folder, parallel, shared=True, offload=True)
        if parallel.is_main:
            torch.save(results, folder / f"{name}.pt")
    stop()


if __name__ == "__main__":
    asked = [[*map(int, division.split(":")), 1][:2] for division in sys.argv[2:]]
    all_checks(Path(sys.argv[1]), [(mp_size, stages) for mp_size, stages in asked])
