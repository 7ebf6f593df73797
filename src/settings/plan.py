"""The settings of the planner: a job, a machine, and what is to be known of them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from src.settings.declaration import AtLeast, Choices, Settings, Unit, idle
from src.settings.model import ArchitectureSettings
from src.settings.ppo import ADVANTAGES
from src.settings.run import Dtype


@dataclass(frozen=True, kw_only=True)
class PlannedModelSettings(ArchitectureSettings):
    """The models, by their sizes alone."""

    critic_model_type: Annotated[
        str | None, "the value and the reward model of PPO; as --model_type when not given"
    ] = None
    critic_config_file: Annotated[str | None, "or its params.json or config.json"] = None


@dataclass(frozen=True, kw_only=True)
class JobSettings(Settings):
    """What is to be done."""

    task: Annotated[
        Literal["sft", "verifier", "ppo"],
        "solver_train.py, verifier_train.py (its rows: two outputs of a prompt) or ppo_train.py",
    ] = "ppo"
    batch: Annotated[
        int,
        AtLeast(1, 10**6),
        "rows of an optimizer step, or rollouts of an iteration, over all ranks",
    ] = 512
    prompt_length: Annotated[int, AtLeast(1), Unit("tokens"), "of most rows"] = 512
    response_length: Annotated[int, AtLeast(1), Unit("tokens"), "of most rows"] = 512
    max_new_tokens: Annotated[
        int | None,
        AtLeast(1),
        Unit("tokens"),
        "of one response, at most: what the cache has room for; --response_length when not given",
    ] = None
    samples_per_prompt: Annotated[int, AtLeast(1), "rollouts of each prompt"] = 1
    ppo_epochs: Annotated[int, AtLeast(1), "passes over each buffer of rollouts"] = 4
    mini_batches: Annotated[int, AtLeast(1), "optimizer steps per pass"] = 4
    advantage: Annotated[
        str, Choices(*ADVANTAGES), "gae has a value model, the others have none"
    ] = "gae"
    reference: Annotated[bool, "whether there is one: a KL penalty (--kl_coef)"] = True
    verifier: Annotated[bool, "whether a reward model scores the rollouts, or else a rule"] = True
    rollout_batch_size: Annotated[
        int, AtLeast(1), "sequences that a model generates at a time, at most"
    ] = 384
    dtype: Dtype = None

    def problems(self) -> Iterator[str]:
        if self.max_new_tokens is not None and self.max_new_tokens < self.response_length:
            yield (
                f"--max_new_tokens {self.max_new_tokens}: is less than --response_length "
                f"{self.response_length}, which most responses have"
            )
        if self.task != "ppo":
            names = ("samples_per_prompt", "ppo_epochs", "mini_batches", "advantage")
            more = ("reference", "verifier", "rollout_batch_size", "max_new_tokens")
            yield from idle(self, names + more, f"with --task {self.task}, which generates nothing")
            return
        if ADVANTAGES[self.advantage].is_grouped and self.samples_per_prompt < 2:
            yield (
                f"--advantage {self.advantage} --samples_per_prompt {self.samples_per_prompt}: "
                "compares the samples of a prompt; give 2 or more"
            )
        if self.batch % self.samples_per_prompt:
            yield (
                f"--batch {self.batch} is no multiple of --samples_per_prompt "
                f"{self.samples_per_prompt}"
            )
        if self.batch < self.mini_batches:
            yield f"--batch {self.batch}: is less than --mini_batches {self.mini_batches}"


@dataclass(frozen=True, kw_only=True)
class MachineSettings(Settings):
    """The machine."""

    gpus: Annotated[
        int | None,
        AtLeast(1, 10**5),
        "ranks in all; with --calibrate those of one node, with --check those of this machine: its "
        "GPUs, or else a rank for each core, when not given",
    ] = None
    gpu: Annotated[str | None, "a name of the table (docs/planning.md)"] = None
    gpus_per_node: Annotated[int, AtLeast(1, 10**4), "with --gpu: in each node"] = 8
    hardware: Annotated[
        str | None, "in place of --gpu: a file of measured rates, as --calibrate writes it"
    ] = None


@dataclass(frozen=True, kw_only=True)
class PlanOutputSettings(Settings):
    """What is wanted."""

    best: Annotated[int, AtLeast(1, 100), "print so many of the quickest plans"] = 3
    out: Annotated[str | None, "write the quickest plan's flags there, as YAML for --config"] = None
    calibrate: Annotated[
        str | None, "measure what this machine reaches, all ranks at once, and write it there"
    ] = None
    check: Annotated[
        bool,
        "measure this machine, run small real cases on it, and print their bytes and seconds "
        "beside the predicted ones: some minutes",
    ] = False


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Settings):
    """All that plan.py knows."""

    models: PlannedModelSettings = PlannedModelSettings()
    job: JobSettings = JobSettings()
    machine: MachineSettings = MachineSettings()
    output: PlanOutputSettings = PlanOutputSettings()

    @property
    def measures(self) -> bool:
        """Whether this machine is measured, in place of planning for one."""
        return self.output.check or self.output.calibrate is not None

    def problems(self) -> Iterator[str]:
        models, machine, output = self.models, self.machine, self.output
        if output.check and output.calibrate is not None:
            yield "--check --calibrate: each measures the machine; give one of the two"
        if self.measures:
            mode = "check" if output.check else "calibrate"
            for name in ("gpu", "hardware"):
                if getattr(machine, name) is not None:
                    yield f"--{name}: has no effect with --{mode}, which measures this machine"
            if output.out is not None:
                yield f"--out: has no effect with --{mode}"
            for group in (models, self.job):
                names = [field.name for field in fields(group)]
                yield from idle(group, names, f"with --{mode}, which has cases of its own")
            yield from idle(machine, ("gpus_per_node",), f"with --{mode}")
            yield from idle(output, ("best",), f"with --{mode}")
            return
        critics = ("critic_model_type", "critic_config_file")
        if self.job.task != "ppo":
            yield from idle(models, critics, f"with --task {self.job.task}")
        if all(getattr(models, name) is not None for name in critics):
            yield "--critic_model_type --critic_config_file: give one of the two"
        if machine.hardware is not None:
            yield from idle(machine, ("gpus_per_node",), "with --hardware, which says it")
        if machine.gpus is None:
            yield "give --gpus, how many there are"
        if (machine.gpu is None) == (machine.hardware is None):
            yield "give --gpu, a name of the table, or --hardware, a file: one of the two"
        if models.model_type is None and models.config_file is None:
            yield "give --model_type, or --config_file with a model's sizes"
