"""The PyTorchJob: against the operator's own models of it, and its command as two pods run it."""

import copy
import re
import socket
from pathlib import Path

import pytest
import yaml

from src.cli import _read
from src.settings.declaration import declared, find_problems
from src.settings.ppo import PPOTrainSettings
from tests.deploy.cluster import PATIENCE_S, Cluster, until
from tests.launch import ROOT, free_port, places

WORKER = "tests/deploy/worker.py"
PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object}


@pytest.fixture
def job() -> dict:
    return yaml.safe_load((ROOT / "deploy/pytorchjob.yaml").read_text())


def built(value, kind: str, path: str):
    """The value as the models of Kubernetes' and of the operator's API have it.

    Raises ValueError for a field that they do not know, one that they need, and another type.
    """
    models = pytest.importorskip("kubeflow.training.models", reason="needs kubeflow-training")
    from kubernetes.client import models as kubernetes_models

    if items := re.fullmatch(r"list\[(.+)\]|dict[(\[]str, (.+)[)\]]", kind):
        if items[1] and isinstance(value, list):
            return [built(item, items[1], f"{path}[{i}]") for i, item in enumerate(value)]
        if items[2] and isinstance(value, dict):
            return {key: built(item, items[2], f"{path}.{key}") for key, item in value.items()}
        raise ValueError(f"{path} is {value!r}: {kind} is needed")
    if kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (kind == "int" and isinstance(value, bool)):
            raise ValueError(f"{path} is {value!r}: {kind} is needed")
        return value
    model = getattr(models, kind, None) or getattr(kubernetes_models, kind)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is {value!r}: {kind} is needed")
    names = {name: attribute for attribute, name in model.attribute_map.items()}
    for name in value:
        if name not in names:
            raise ValueError(f"{path}.{name}: {kind} has none")
    fields = {
        names[name]: built(item, model.openapi_types[names[name]], f"{path}.{name}")
        for name, item in value.items()
    }
    try:
        return model(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def worker_of(job: dict) -> dict:
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]


def test_the_operators_api_takes_every_field(job):
    whole = built(job, "KubeflowOrgV1PyTorchJob", "job")
    assert whole.spec.pytorch_replica_specs["Worker"].template.spec.containers[0].name == "pytorch"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda job: job["spec"].update(elastic=1), "job.spec.elastic: Kubeflow"),
        (lambda job: worker_of(job).update(replicas="2"), "Worker.replicas is '2': int is needed"),
        (lambda job: worker_of(job)["template"]["spec"].pop("containers"), "must not be `None`"),
        (
            lambda job: worker_of(job)["template"]["spec"]["containers"][0].update(args="--lr 1"),
            "containers[0].args is '--lr 1'",
        ),
    ],
)
def test_the_check_finds_what_is_wrong(job, damage, message):
    damage(job)
    with pytest.raises(ValueError, match=re.escape(message)):
        built(job, "KubeflowOrgV1PyTorchJob", "job")


def test_what_has_to_agree_agrees(job):
    spec, worker = job["spec"], worker_of(job)
    nodes, elastic = worker["replicas"], spec["elasticPolicy"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == nodes
    assert spec["runPolicy"]["schedulingPolicy"]["minAvailable"] == nodes
    assert worker["restartPolicy"] == "ExitCode"
    pod, labels = worker["template"]["spec"], worker["template"]["metadata"]["labels"]
    affinity = pod["affinity"]
    apart = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    near = affinity["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    for term in (*apart, *(term["podAffinityTerm"] for term in near)):
        assert term["labelSelector"]["matchLabels"] == labels
    assert [term["topologyKey"] for term in apart] == ["kubernetes.io/hostname"]
    [container] = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in copy.deepcopy(pod["volumes"])}
    assert mounts.keys() == volumes.keys() and mounts["shared-memory"] == "/dev/shm"
    assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
    limits, requests = (container["resources"][name] for name in ("limits", "requests"))
    assert limits["nvidia.com/gpu"] == requests["nvidia.com/gpu"]  # Kubernetes wants it so
    # Where the operator has the launchers meet, and what it looks for.
    assert container["name"] == "pytorch"
    assert container["ports"] == [{"name": "pytorchjob-port", "containerPort": 23456}]
    # The operator starts again what ends with 128 or more (its IsRetryableExitCode).
    [stopped] = [item["value"] for item in container["env"] if item["name"] == "EXIT_STOPPED"]
    assert 128 <= int(stopped) <= 255


def test_the_trainer_takes_the_flags(job):
    script, *flags = worker_of(job)["template"]["spec"]["containers"][0]["args"]
    assert script == "ppo_train.py"
    values, labels, problems = _read(flags, declared(PPOTrainSettings))
    problems += find_problems(PPOTrainSettings, values, labels)
    assert problems == []


def test_two_pods_train_and_start_anew_when_one_is_evicted(job, tmp_path):
    """Its own command, with the operator's variables; a small script stands for the trainer.

    The second one's rank takes longer to end than the first launcher, where both have met.
    """
    [container] = worker_of(job)["template"]["spec"]["containers"]
    elastic = job["spec"]["elasticPolicy"]
    conf = ",".join(f"{item['key']}={item['value']}" for item in elastic["rdzvConf"])
    port = free_port()
    # As its elastic.go makes them.
    variables = {
        "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}",
        "PET_RDZV_CONF": conf,
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
        "PET_LOCAL_ADDR": "127.0.0.1",
    } | {item["name"]: item["value"] for item in container["env"]}
    gpus, one = "--nproc_per_node=gpu", "--nproc_per_node=1"
    assert gpus in container["command"]
    command = [one if word == gpus else word for word in container["command"]]
    flags = [WORKER, "--folder", str(tmp_path), "--save_dir", str(tmp_path / "out")]
    with places(2), Cluster(tmp_path / "cluster", **variables) as cluster:
        first = cluster.run(*command, *flags, name="pod-0")
        until(lambda: listens(port), cluster, first)
        leaves = tmp_path / "leaves"
        second = cluster.run(*command, *flags, name="pod-1", LEAVES_AFTER=str(leaves))
        ranks = [tmp_path / f"rank-{rank}" for rank in (0, 1)]
        until(lambda: all(map(Path.exists, ranks)), cluster, first, second)
        second.terminate()
        assert first.wait(PATIENCE_S) == 143, cluster.said()
        leaves.touch()
        assert second.wait(PATIENCE_S) == 143, cluster.said()
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))
