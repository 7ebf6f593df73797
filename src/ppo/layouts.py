"""How the roles of a PPO run lie on its ranks, phase by phase, as its settings say."""

from dataclasses import dataclass, fields, replace

from src.errors import UserError
from src.parallel.layout import Layout
from src.parallel.setup import tensor_degree
from src.settings.ppo import LayoutSettings
from src.settings.run import TrainingRunSettings


@dataclass(frozen=True)
class Layouts:
    """By the names that ReaL (arXiv 2406.14088) has for the phases."""

    actor_train: Layout
    actor_gen: Layout
    critic_train: Layout
    critic_inf: Layout
    ref_inf: Layout
    rew_inf: Layout

    @classmethod
    def of(
        cls, given: LayoutSettings, run: TrainingRunSettings, rollouts: int, world_size: int
    ) -> "Layouts":
        """For so many ranks, and rollouts of an iteration.

        Raises UserError for what cannot be divided so.
        """

        def parsed(name: str) -> Layout | None:
            text = getattr(given, name)
            if text is None:
                return None
            zero = run.zero if name.endswith("_train") else 1
            layout = Layout.parsed(text, world_size, f"--{name}", zero)
            _check(layout, text, name)
            return layout

        actor_train = parsed("actor_train") or _of_run(run, world_size)
        # Without stages, and each model with as much memory as it is trained in.
        degree = actor_train.model_size
        generates = _frozen(replace(actor_train, dp=actor_train.size // degree, pp=1, tp=degree))
        critic_train = parsed("critic_train") or actor_train
        layouts = cls(
            actor_train,
            parsed("actor_gen") or generates,
            critic_train,
            parsed("critic_inf") or critic_train,
            parsed("ref_inf") or _frozen(actor_train),
            parsed("rew_inf") or _frozen(actor_train),
        )
        for name, layout in layouts.by_name().items():
            if rollouts < layout.models:
                raise UserError(
                    f"--max_buffer_size {rollouts}: the {layout.models} data-parallel models of "
                    f"--{name} '{layout}' share the rollouts, and each needs one: raise it, or "
                    "give more ranks to a model (--model_parallel_size)"
                )
        return layouts

    def by_name(self) -> dict[str, Layout]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def described(self) -> str:
        """In words, for the log: the policy's, and the others where they are others."""
        lines = [self.actor_train.described]
        frozen = _frozen(self.actor_train)
        for name, layout in self.by_name().items():
            if name != "actor_train" and not layout.is_like(frozen):
                lines.append(f"{name} {layout}")
        return "; ".join(lines)


def _of_run(run: TrainingRunSettings, world_size: int) -> Layout:
    """As --model_parallel_size and the like say."""
    pp = run.pipeline_parallel_size
    tp = tensor_degree(world_size, run.model_parallel_size, pp, 1)
    dp = world_size // (tp * pp)
    return Layout(dp, pp, tp, run.sequence_parallel, 1, run.zero, run.stages_per_rank)


def _frozen(layout: Layout) -> Layout:
    """The same ranks for a model that is not trained: weights are all that it has."""
    return replace(layout, sp=False, zero=1, vp=1)


def _check(layout: Layout, text: str, name: str) -> None:
    """Raise UserError for what a phase cannot have."""
    head = f"--{name} '{text}'"
    trains = name.endswith("_train")
    if layout.cp > 1:
        raise UserError(
            f"{head}: context parallelism is for training on rows; each model here learns from "
            "rollouts of its own, whole: leave cp out"
        )
    words = text.split()
    more = [word for word in words if word == "sp" or word.startswith(("zero", "vp"))]
    if more and not trains:
        raise UserError(f"{head}: {more[0]} is for what is trained; leave it out")
    if name == "actor_gen" and layout.pp > 1:
        raise UserError(
            f"{head}: generation goes token by token, and stages would wait for each other at "
            "each; give tp and dp"
        )
    if layout.vp > 1 and layout.pp == 1:
        raise UserError(f"{head}: vp{layout.vp} has no effect without stages (pp)")
    if layout.pp > 1 and layout.zero >= 2:
        raise UserError(
            f"{head}: weights would be put together for every micro-batch of every stage (zero"
            f"{layout.zero}); give zero1"
        )
    if layout.sp and layout.tp == 1:
        raise UserError(f"{head}: sp has no effect with 1 rank per tensor; give tp2 or more")
