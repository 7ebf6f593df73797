"""A job and a machine from the planner's settings."""

from src.checkpoint.source import config_of_type
from src.errors import UserError
from src.models.config import ModelConfig
from src.models.hf_config import PRESETS
from src.parallel.setup import DTYPES
from src.planner.hardware import Hardware, published
from src.planner.job import Job, job_of
from src.settings.plan import MachineSettings, PlanSettings


def planned_job(settings: PlanSettings, hardware: Hardware) -> Job:
    """Raises UserError for a model that is not known."""
    models, job = settings.models, settings.job
    actor = _config(models.model_type, models.config_file, "")
    critic: ModelConfig = actor
    if models.critic_model_type is not None or models.critic_config_file is not None:
        critic = _config(models.critic_model_type, models.critic_config_file, "critic_")
    return job_of(
        job.task,
        actor,
        critic,
        job.advantage,
        job.reference,
        job.verifier,
        dtype=DTYPES[job.dtype] if job.dtype else hardware.dtype,
        batch=job.batch,
        prompt=job.prompt_length,
        response=job.response_length,
        longest=job.max_new_tokens or job.response_length,
        samples_per_prompt=job.samples_per_prompt,
        ppo_epochs=job.ppo_epochs,
        mini_batches=job.mini_batches,
        rollout_batch_size=job.rollout_batch_size,
    )


def _config(model_type: str | None, config_file: str | None, prefix: str) -> ModelConfig:
    if config_file is None and model_type not in PRESETS:
        raise UserError(
            f"--{prefix}model_type {model_type}: is not known ({', '.join(PRESETS)}); give "
            f"--{prefix}config_file, a params.json or config.json"
        )
    return config_of_type(model_type, config_file)


def hardware_of(machine: MachineSettings, dtype: str | None) -> Hardware:
    """Measured, or of the table."""
    if machine.hardware is not None:
        return Hardware.read(machine.hardware)
    assert machine.gpu is not None
    return published(machine.gpu, machine.gpus_per_node, DTYPES[dtype or "bf16"])
