"""The TorchX components: what each scheduler would be asked for, and what a shell makes of it."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.deploy.cluster import Cluster
from tests.launch import ROOT

pytest.importorskip("torchx", reason="needs torchx (pip install -r requirements-dev.txt)")

from torchx.runner import get_runner

FILE = ROOT / "deploy/components.py"
COMPONENTS = (
    *("solver_train", "verifier_train", "preference_train", "distill_train"),
    *("ppo_train", "solver_evaluate"),
)
WORDS = ["--actor_save_dir", "a folder", "--stop_strings", "$HOME 'x' \"y\" ${z}", "--lr=1e-6"]


@pytest.fixture
def runner():
    with get_runner() as runner:
        yield runner


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path / "cluster", nodes=2) as cluster:
        yield cluster


def request(runner, component: str, arguments: list[str], scheduler: str, **cfg):
    """What the scheduler would be asked for."""
    name = f"{FILE}:{component}"
    return runner.dryrun_component(name, arguments, scheduler, cfg).request


def launched(cluster: Cluster, command: list[str], **env: str) -> list[str]:
    """The words that a node's command starts Python with."""
    cluster.calls.clear()
    cluster.ends = [0]
    assert cluster.run(*command, **env).wait(60) == 0, cluster.said()
    [args] = cluster.called("python")
    return args


def is_a_launch(args: list[str], script: str, first_node: str) -> bool:
    """Of two nodes of four ranks each, which meet at the first one."""
    options = dict(zip(args[1 : -len(WORDS) - 1 : 2], args[2 : -len(WORDS) - 1 : 2]))
    assert args[0] == "deploy/launch.py" and args[-len(WORDS) - 1 :] == [script, *WORDS]
    return (
        options.items()
        >= {
            "--nnodes": "2",
            "--nproc_per_node": "4",
            "--rdzv_backend": "c10d",
            "--rdzv_endpoint": f"{first_node}:29500",
        }.items()
    )


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_trainer_runs_here_on_two_launchers(runner, cluster, component):
    """-s local_cwd"""
    asked = request(runner, component, ["-j", "2x4", "--", *WORDS], "local_cwd", log_dir="/tmp")
    [nodes] = asked.role_params.values()
    assert len(nodes) == 2 and (ROOT / f"{component}.py").is_file()
    for node in nodes:
        first = node.env["TORCHX_RANK0_HOST"]
        args = launched(cluster, node.args, TORCHX_RANK0_HOST=first)
        assert is_a_launch(args, f"{component}.py", "localhost")


def test_slurm(runner, cluster):
    arguments = ["-j", "2x4", "--cpu", "32", "--max_retries", "3", "--", *WORDS]
    cfg = dict(partition="gpu", time="1:00:00")
    script = request(runner, "ppo_train", arguments, "slurm", **cfg).materialize()
    assert script.count("#SBATCH --job-name") == 2 and "--cpus-per-task=32" in script
    assert "--partition=gpu --time=1:00:00" in script
    cluster.ends = [0]
    assert cluster.run("bash", "-c", script, SLURM_JOB_ID="7").wait(60) == 0, cluster.said()
    [args] = cluster.called("srun")
    starts = [i for i, word in enumerate(args) if word == "bash"]
    assert len(starts) == 2 and args[starts[1] - 1].startswith("--")
    for start in starts:
        node = {"SLURM_JOB_NODELIST_HET_GROUP_0": "node9"}
        words = launched(cluster, args[start : start + 3], **node)
        assert is_a_launch(words, "ppo_train.py", "node9")
        assert words[words.index("--rdzv_id") + 1] == "7"


def test_kubernetes(runner, cluster):
    """Volcano jobs, by TorchX's own client."""
    pytest.importorskip("kubernetes", reason="TorchX needs the client (pip install kubernetes)")
    arguments = ["-j", "2x4", "--mounts", "type=volume,src=rlhf,dst=/data", "--", *WORDS]
    cfg = dict(queue="gpus", validate_spec=False)  # which would ask the cluster
    job = request(runner, "ppo_train", arguments, "kubernetes", **cfg).resource
    assert job["kind"] == "Job" and job["spec"]["queue"] == "gpus"
    nodes = [task["template"].spec for task in job["spec"]["tasks"]]
    assert len(nodes) == 2
    for pod in nodes:
        [container] = pod.containers
        assert container.image == "own-your-rlhf:cuda"
        assert container.resources.limits["nvidia.com/gpu"] == "4"
        claims = [v.persistent_volume_claim for v in pod.volumes if v.persistent_volume_claim]
        assert [claim.claim_name for claim in claims] == ["rlhf"]
    first, second = (pod.containers[0] for pod in nodes)
    env = {variable.name: variable.value for variable in first.env}
    assert is_a_launch(launched(cluster, first.command, **env), "ppo_train.py", "localhost")
    # Volcano's variable for the first task's pods: VC_ and the task's name in capitals.
    task = job["spec"]["tasks"][0]["name"].upper().replace("-", "_")
    args = launched(cluster, second.command, **{f"VC_{task}_HOSTS": "ppo-0.ppo"})
    assert is_a_launch(args, "ppo_train.py", "ppo-0.ppo")


def test_aws_batch(runner, cluster):
    arguments = ["-j", "2x4", "--memMB", "1000", "--max_retries", "2", "--", *WORDS]
    asked = request(runner, "ppo_train", arguments, "aws_batch", queue="gpus")
    properties = asked.job_def["nodeProperties"]
    assert asked.queue == "gpus" and properties["numNodes"] == 2
    [nodes] = properties["nodeRangeProperties"]
    container = nodes["container"]
    assert nodes["targetNodes"] == "0:1"
    assert {"type": "GPU", "value": "4"} in container["resourceRequirements"]
    main = "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"  # which the main node itself lacks
    for env, first in (({}, "localhost"), ({main: "10.0.0.1"}, "10.0.0.1")):
        args = launched(cluster, container["command"], **env)
        assert is_a_launch(args, "ppo_train.py", first)


def test_aws_sagemaker(runner, monkeypatch):
    """SageMaker starts the ranks itself, and takes flags with values only."""
    try:
        import boto3  # noqa: F401
    except ImportError:  # a dry run asks nothing of it
        session = types.SimpleNamespace(Session=object)
        module = types.ModuleType("boto3")
        module.session = session
        monkeypatch.setitem(sys.modules, "boto3", module)
    flags = ["--strict_length", "--lora_rank", "-1", "--lr=1e-6", "--deterministic"]
    arguments = ["-j", "2x4", "--launcher", "sagemaker", "--", *flags]
    cfg = dict(role="trainer", instance_type="ml.p5.48xlarge", instance_count=2)
    asked = request(runner, "ppo_train", arguments, "aws_sagemaker", **cfg).job_def
    assert asked["source_code"]["entry_script"] == "ppo_train.py"
    assert asked["training_image"] == "own-your-rlhf:cuda" and asked["distributed"]
    assert asked["compute"]["instance_count"] == 2
    assert asked["hyperparameters"] == {
        "strict_length": "true",
        "lora_rank": "-1",
        "lr": "1e-6",
        "deterministic": "true",
    }


def test_one_node_meets_itself_at_a_free_port(runner, cluster):
    asked = request(runner, "ppo_train", ["-j", "1x4"], "local_cwd", log_dir="/tmp")
    [[node]] = asked.role_params.values()
    args = launched(cluster, node.args)
    assert args[args.index("--rdzv_endpoint") + 1] == "localhost:0"


def test_an_unknown_launcher_is_refused(runner):
    with pytest.raises(ValueError, match="--launcher mpi: torchrun or sagemaker"):
        request(runner, "ppo_train", ["--launcher", "mpi"], "local_cwd", log_dir="/tmp")


def test_the_command_line_knows_each_component_and_its_flags(tmp_path):
    """As a user types it."""
    torchx = Path(sys.executable).parent / "torchx"
    command = [torchx, "run", "--dryrun", "-s", "local_cwd", f"{FILE}:ppo_train", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PPO, GRPO, RLOO" in done.stdout and "--max_retries" in done.stdout
