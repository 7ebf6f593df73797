"""Nodes that share no folder: launchers of their own, in folders of their own, on this machine.

One is lost with its disk, others go on; one comes with an empty disk.
"""

import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from src.checkpoint.manifest import read_manifest
from src.checkpoint.steps import list_steps
from tests.faults.harness import PATIENCE_S, Run, curve, hashes, steps_in
from tests.launch import free_port
from tests.test_scripts import call, flags, refused

STAGES = ("made", "written", "copied", "manifest", "renamed", "published", "pruned")
# Of a rank's share of the batch on two ranks and on one, the rows are the same.
SIZES = {1: dict(max_batch_size=4), 2: dict(max_batch_size=2)}
SAME = dict(model_parallel_size=1, keep=50, timeout=20)


class Cluster:
    """Nodes that have nothing in common but a trainer's command, each with its copy of the data."""

    def __init__(self, base: Path, folder: Path, trainer: str) -> None:
        self.base, self.folder, self.trainer = base, folder, trainer

    def disk(self, name: str) -> Path:
        """The folder that a node works in, with the models and rows, as it was left."""
        disk = self.folder / name
        for part in ("start", "verifier", "data"):
            if not (disk / part).exists():
                shutil.copytree(self.base / part, disk / part)
        return disk

    @property
    def every(self) -> int:
        """Steps, or iterations, from one that is saved to the next."""
        return 4 if self.trainer == "SFT" else 1

    def command(self, ranks: int, **more) -> list[str]:
        """Relative paths throughout."""
        given = SAME | dict(train_file="data/train.json", lr=1e-3)
        if self.trainer == "SFT":
            given |= dict(ckpt_dir="start", save_dir="out/model", epochs=1, save_every=self.every)
            return ["solver_train.py", *flags(**given | SIZES.get(ranks, {}) | more)]
        given |= dict(actor_ckpt_dir="start", critic_ckpt_dir="verifier", max_batch_size=4)
        given |= dict(reward_model_ckpt_dir="verifier", max_buffer_size=8, iterations=4)
        given |= dict(actor_save_dir="out/model", critic_save_dir="out/critic", critic_lr=1e-3)
        given |= dict(mini_batches=2, max_new_tokens=6, ref_ema=0.9, save_every=self.every)
        return ["ppo_train.py", *flags(**given | more)]

    def run(self, disks: list[str], lost: tuple = (), ranks: int = 1, **more) -> list[Run]:
        """A run on nodes of so many ranks each, to its end. lost: as tests/faults/lost_node.py."""
        script = ["tests/faults/lost_node.py", *map(str, lost)] if lost else []
        command = [*script, *self.command(ranks * len(disks), **more)]
        port = free_port()
        with ExitStack() as stack:
            runs = []
            for node, name in enumerate(disks):
                place = dict(nodes=len(disks), node=node, port=port)
                log = self.folder / f"{name}.log"
                log.write_text("")
                runs.append(Run(command, ranks, log, cwd=self.disk(name), **place))
                stack.callback(runs[-1].end)
            began = time.monotonic()
            while any(run.process.poll() is None for run in runs):
                assert time.monotonic() - began < 2 * PATIENCE_S, [r.said()[-3000:] for r in runs]
                time.sleep(0.01)
            return runs

    def one(self, name: str, ranks: int, **more) -> Run:
        """A run of one launcher, which must succeed."""
        (run,) = self.run([name], ranks=ranks, **more)
        assert run.process.returncode == 0, run.said()[-3000:]
        return run

    def state(self, name: str) -> Path:
        return self.folder / name / "out" / "model-state"

    def made(self, name: str) -> tuple:
        out = self.folder / name / "out"
        return hashes(out / "model"), hashes(out / "critic")

    def left_at(self, source: str, name: str, step: int) -> None:
        """A disk as a run on another one had left it after a step."""
        shutil.copytree(self.folder / source, self.folder / name)
        out = self.folder / name / "out"
        for path in (*out.glob("model"), *out.glob("critic"), out / "model-logs"):
            shutil.rmtree(path, ignore_errors=True)
        (self.state(name) / "finished.json").unlink()
        for path in list_steps(self.state(name)):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)


@pytest.fixture(scope="module")
def cluster(base, tmp_path_factory):
    """Of a trainer, with the disk `shared`: two ranks of one launcher trained there, to the end."""
    known = {}

    def of(trainer: str) -> Cluster:
        if trainer not in known:
            known[trainer] = Cluster(base, tmp_path_factory.mktemp(trainer), trainer)
            known[trainer].one("shared", 2)
        return known[trainer]

    return of


def saved_bits(step: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in read_manifest(step)["files"].items()}


@pytest.mark.parametrize("trainer, lost", [("SFT", 1), ("PPO", 0)])
def test_a_node_is_lost_and_the_other_goes_on_alone(cluster, trainer, lost):
    """To the same bits as from a shared folder; rank 0's node is lost, or the other."""
    nodes = cluster(trainer)
    runs, disks = nodes.run(["a", "b"], lost=(lost, "copied", 3)), ["a", "b"]
    left, said = disks[1 - lost], runs[1 - lost].said()
    assert all(run.process.returncode != 0 for run in runs)
    who = "rank 1 of 2 did not come to what all ranks do together"
    if lost == 0:
        who = "who cannot be told: the machine of the rendezvous does not answer"
    assert who in said, said[-3000:]
    if lost == 1:  # the other is where the log is
        assert "2 nodes have a out/model-state of their own" in said

    # The step that was being written is none; the one before is whole on the node that is left.
    second = 2 * nodes.every
    step = list_steps(nodes.state(left))[-1]
    assert steps_in(nodes.state(left)) == [nodes.every, second]
    assert saved_bits(step) == saved_bits(nodes.state("shared") / step.name)
    shutil.rmtree(nodes.folder / disks[lost])  # the disk is lost, too
    nodes.one(left, 1)
    assert read_manifest(list_steps(nodes.state(left))[-1]).get("nodes") is None

    nodes.left_at("shared", "shared, then one", second)
    nodes.one("shared, then one", 1)
    assert nodes.made(left) == nodes.made("shared, then one")
    assert steps_in(nodes.state(left)) == steps_in(nodes.state("shared"))


def test_a_node_with_an_empty_disk_joins(cluster):
    """What it reads comes over the process group; the same bits as without a change of nodes."""
    nodes = cluster("SFT")
    nodes.left_at("shared", "old", 8)
    runs = nodes.run(["old", "new"])
    assert [run.process.returncode for run in runs] == [0, 0], runs[0].said()[-3000:]
    said = runs[0].said()
    entries = read_manifest(nodes.state("shared") / "step-00000008")["files"]
    # The second rank reads the weights of the first, and what it had itself.
    size = (
        sum(entry["size"] for entry in entries.values())
        - entries["random.dp-00.safetensors"]["size"]
    )
    assert f"3 files of step-00000008, {size:,} bytes, went between nodes to be read" in said
    assert nodes.made("old") == nodes.made("shared")
    assert curve(nodes.folder / "old" / "out" / "model-logs").keys() == {9, 10, 11, 12}
    assert not (nodes.folder / "new" / "out" / "model").exists(), "it is on the first node"
    assert not list(nodes.state("new").glob(".*")) and steps_in(nodes.state("new")) == [12]
    new = nodes.state("new") / "step-00000012"
    assert saved_bits(new) == saved_bits(nodes.state("shared") / "step-00000012")
    verified = call("checkpoint_verify.py", "--ckpt_dir", new)
    assert verified.code == 0 and "4 of 4 files are this node's, node 1" in verified.out


def test_a_step_that_is_not_all_there_is_named(cluster, monkeypatch):
    """With --save_copies 1 a step is gone with its node."""
    nodes = cluster("SFT")
    runs = nodes.run(["c", "d"], save_copies=1)
    assert [run.process.returncode for run in runs] == [0, 0], runs[0].said()[-3000:]
    assert nodes.made("c") == nodes.made("shared")
    shutil.rmtree(nodes.folder / "c" / "out" / "model")
    monkeypatch.chdir(nodes.folder / "c")
    script, *rest = nodes.command(1, save_copies=1)
    done = call(script, *rest)
    message = (
        "step-00000012: 2 of 4 files are on none of the nodes of this run: "
        "model.mp-00.dp-01.safetensors, random.dp-01.safetensors; they were on node 1 ("
    )
    refused(done, message)


def test_nodes_with_other_rows_are_refused(cluster):
    nodes = cluster("SFT")
    rows = nodes.disk("f") / "data" / "train.json"
    rows.write_text(rows.read_text().replace("1", "2", 1))
    runs = nodes.run(["e", "f"])
    assert all(run.process.returncode != 0 for run in runs)
    said = runs[0].said().split("failed (exitcode")[0]  # what follows is the launcher's
    message = "do not run the same: --train_file data/train.json holds something else now"
    assert "error: node 0 (" in said and message in said and "Traceback" not in said
    assert not nodes.state("e").exists() and not nodes.state("f").exists()


@pytest.mark.parametrize("trainer", ["SFT", "PPO"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_node_is_lost_at_any_stage_of_a_step_and_comes_back(cluster, full, trainer, stage):
    """The step is whole on both nodes or on none, and what follows has the same bits."""
    if not full:
        pytest.skip("tried by `make faults`")
    nodes, number = cluster(trainer), STAGES.index(stage)
    disks = [f"{stage} 0", f"{stage} 1"]
    nodes.run(disks, lost=(number % 2, stage, 2))
    newest = [max(steps_in(nodes.state(disk))) for disk in disks]
    first, second = nodes.every, 2 * nodes.every
    if stage in ("made", "written", "copied"):
        assert newest == [first, first]
    elif stage in ("published", "pruned"):
        assert newest == [second, second]
    runs = nodes.run(disks)
    assert [run.process.returncode for run in runs] == [0, 0], runs[0].said()[-3000:]
    assert f"goes on after step {max(newest)}, from out/model-state" in runs[0].said()
    assert nodes.made(disks[0]) == nodes.made("shared")
    assert steps_in(nodes.state(disks[0])) == steps_in(nodes.state(disks[1]))
    print(f"{trainer}, a node lost at {stage}: newest {newest}, both went on, the same bits")


@pytest.mark.parametrize("trainer", ["SFT", "PPO"])
def test_nodes_of_two_ranks_in_other_layouts(cluster, full, trainer):
    """A model across nodes; its shards come to the first; the step goes on in another layout."""
    if not full:
        pytest.skip("tried by `make faults`")
    nodes = cluster(trainer)
    wide = dict(model_parallel_size=4) if trainer == "PPO" else dict(pipeline_parallel_size=2)
    if trainer == "SFT":
        wide |= dict(model_parallel_size=2, accumulation_steps=2, max_batch_size=2)
    runs = nodes.run(["w 0", "w 1"], lost=(1, "copied", 2), ranks=2, **wide)
    assert all(run.process.returncode != 0 for run in runs)
    assert steps_in(nodes.state("w 0")) == [nodes.every]
    for node in "01":
        shutil.copytree(nodes.folder / f"w {node}", nodes.folder / f"x {node}")
    alone = dict(model_parallel_size=2) | (SIZES[1] if trainer == "SFT" else {})
    nodes.one("w 0", 2, **alone)
    # Both again, beside two that nothing happened to. (One launcher's ranks add in another order.)
    for disks in (["x 0", "x 1"], ["v 0", "v 1"]):
        runs = nodes.run(disks, ranks=2, **wide)
        assert [run.process.returncode for run in runs] == [0, 0], runs[0].said()[-3000:]
    assert nodes.made("x 0") == nodes.made("v 0")
    shards = nodes.made("x 0")[0]
    assert len(shards) == wide["model_parallel_size"], "a model's that lies on both nodes"
