r"""Each trainer as a TorchX component, for all of TorchX's schedulers.

    torchx run -s slurm -cfg partition=gpu,time=24:00:00 deploy/components.py:ppo_train -j 4x8 \
        --max_retries 9 -- --actor_ckpt_dir sft --actor_save_dir OUT --max_minutes 1430 ...

What follows the `--` are the trainer's own flags. A job has one launcher (deploy/launch.py) on each
node, which meet at the first one's. docs/clusters.md says what each scheduler needs.
"""

import shlex
from collections.abc import Callable, Iterable
from typing import Dict, List, Optional  # noqa: UP035  # as the last release of TorchX reads them

from torchx import specs
from torchx.components.dist import parse_nnodes

IMAGE = "own-your-rlhf:cuda"  # deploy/Dockerfile
PORT = 29500


def component(trainer: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
    """A component that starts the script of that name; its docstring is the trainer's.

    TorchX looks for a function of each component's name in this file, and makes the flags out of
    the signature and the documentation of what then has that name.
    """

    def launch(
        *args: str,
        j: str = "1x8",
        image: str = IMAGE,
        h: str = "",
        cpu: int = 64,
        gpu: int = -1,
        memMB: int = 512 * 1024,
        env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
        mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
        max_retries: int = 0,
        port: int = PORT,
        launcher: str = "torchrun",
        name: str = "",
    ) -> specs.AppDef:
        script = f"{trainer.__name__}.py"
        _, n_nodes, n_ranks, nodes = parse_nnodes(j)
        if launcher == "sagemaker":
            entrypoint, words = "python", [script, *named(args)]
        elif launcher == "torchrun":
            entrypoint, words = "bash", ["-c", command(script, args, nodes, n_nodes, n_ranks, port)]
        else:
            raise ValueError(f"--launcher {launcher}: torchrun or sagemaker")
        gpus = n_ranks if gpu < 0 else gpu
        role = specs.Role(
            name=trainer.__name__,
            image=image,
            entrypoint=entrypoint,
            args=words,
            env={"NCCL_DEBUG": "WARN", **(env or {})},
            num_replicas=n_nodes,
            resource=specs.resource(cpu=cpu, gpu=gpus, memMB=memMB, h=h or None),
            port_map={"c10d": port},
            max_retries=max_retries,
            mounts=specs.parse_mounts(mounts) if mounts else [],
        )
        return specs.AppDef(name=name or trainer.__name__.replace("_", "-"), roles=[role])

    launch.__name__ = trainer.__name__
    launch.__doc__ = f"""{trainer.__doc__}

    Args:
        args: the script's flags, after `--`
        j: nodes x ranks on each, as 4x8
        image: what runs, where there are containers; the repository is its working folder
        h: a named resource of TorchX, such as aws_p5.48xlarge, which stands for cpu, gpu and memMB
        cpu: cores of a node
        gpu: GPUs of a node; one for each rank, when not given
        memMB: memory of a node
        env: variables, as NCCL_SOCKET_IFNAME=eth0,NCCL_DEBUG=INFO
        mounts: what the containers see of other storage, in TorchX's words
        max_retries: how often the job starts again when it has not ended with 0
        port: where the launchers meet on the first node
        launcher: torchrun, or sagemaker, which starts the ranks itself
        name: of the job
    """
    return launch


def command(
    script: str, args: Iterable[str], nodes: str, n_nodes: int, n_ranks: int, port: int
) -> str:
    """For a shell on each node, where a variable of the scheduler's holds the first node's name.

    The first node itself may lack it (AWS Batch).
    """
    first = f"$${{{specs.macros.rank0_env}:=localhost}}:{port}"  # TorchX makes one $ of two
    rendezvous = f'"{first}"' if n_nodes > 1 else "localhost:0"
    words = [escaped(word) for word in (script, *args)]
    return " ".join(
        [
            f"exec python deploy/launch.py --nnodes {nodes} --nproc_per_node {n_ranks}",
            f"--rdzv_backend c10d --rdzv_endpoint {rendezvous} --rdzv_id {specs.macros.app_id}",
            f"--rdzv_conf read_timeout=600 {' '.join(words)}",
        ]
    )


def escaped(word: str) -> str:
    """A word as it stands, for the shell and for TorchX's macros."""
    return shlex.quote(word).replace("$", "$$")


def named(args: Iterable[str]) -> list[str]:
    """Flags as SageMaker takes them: each with a value."""
    words = list(args)
    pairs: list[str] = []
    for i, word in enumerate(words):
        is_bare = word.startswith("--") and "=" not in word
        has_value = i + 1 < len(words) and not words[i + 1].startswith("--")
        pairs.append(f"{word}=true" if is_bare and not has_value else word)
    return pairs


@component
def solver_train(*args: str) -> specs.AppDef:
    """Train a solver on instructions and outputs: supervised fine-tuning."""


@component
def verifier_train(*args: str) -> specs.AppDef:
    """Train a verifier, which scores answers."""


@component
def preference_train(*args: str) -> specs.AppDef:
    """Train a solver on preferences: DPO and its family."""


@component
def distill_train(*args: str) -> specs.AppDef:
    """Train a solver on a larger model's distributions."""


@component
def ppo_train(*args: str) -> specs.AppDef:
    """Improve a solver by rewards: PPO, GRPO, RLOO."""


@component
def solver_evaluate(*args: str) -> specs.AppDef:
    """Measure a solver on a task."""
