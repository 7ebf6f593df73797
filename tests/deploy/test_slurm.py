"""The SLURM script on a cluster of this machine: two launchers, a real job, and its ends."""

import subprocess
from pathlib import Path

import pytest

from tests.deploy.cluster import PATIENCE_S, Cluster, until
from tests.launch import ROOT, free_port, places

SCRIPT = str(ROOT / "deploy/slurm.sh")
WORKER = "tests/deploy/worker.py"


def job(nodes: int = 2) -> dict[str, str]:
    """What SLURM tells a job."""
    return {
        "SLURM_JOB_ID": "4217",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_CPUS_PER_TASK": "2",
        "NPROC_PER_NODE": "1",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path / "cluster", nodes=2) as cluster:
        yield cluster


def test_a_job_on_two_nodes_is_told_to_stop_saves_and_goes_back_into_the_queue(cluster, tmp_path):
    ranks = [tmp_path / f"rank-{rank}" for rank in (0, 1)]
    with places(2):
        port = str(free_port())
        script = cluster.run(SCRIPT, WORKER, "--folder", str(tmp_path), **job(), RDZV_PORT=port)
        until(lambda: all(map(Path.exists, ranks)), cluster, script)
        script.terminate()
        assert script.wait(PATIENCE_S) == 75, cluster.said()
    # One rank on each node, in the launchers' order, and one sum of all.
    assert [rank.read_text() for rank in ranks] == ["node 0 sum 1", "node 1 sum 1"]
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1)), cluster.said()
    assert cluster.called("scancel") == [["--signal=TERM", "4217"]]
    assert cluster.called("scontrol")[-1] == ["requeue", "4217"]
    # One model over both nodes, which is what a run without --model_parallel_size has.
    assert cluster.said().count("lie on several nodes of 1 rank each") == 1


@pytest.mark.parametrize(
    "code, state, requeued",
    [
        (0, "RUNNING", False),
        (1, "RUNNING", False),
        (2, "RUNNING", False),
        (75, "RUNNING", True),  # by --max_minutes: nobody has sent a signal
        (75, "COMPLETING", False),  # cancelled meanwhile
        (137, "RUNNING", False),
    ],
)
def test_what_becomes_of_a_job_by_its_exit_code(cluster, code, state, requeued):
    cluster.ends, cluster.state = [code], state
    script = cluster.run(SCRIPT, "ppo_train.py", **job())
    assert script.wait(PATIENCE_S) == code, cluster.said()
    assert (["requeue", "4217"] in cluster.called("scontrol")) == requeued


def test_each_node_gets_one_launcher_with_the_command_word_for_word(cluster):
    cluster.ends = [0]
    words = [
        "ppo_train.py",
        "--actor_save_dir",
        "a folder",
        "--stop_strings",
        "$HOME 'x'",
        "--lr=1",
    ]
    more = {"SLURM_RESTART_COUNT": "3", "SRUN_FLAGS": "--container-image=rlhf --label"}
    cluster.run(SCRIPT, *words, **job(), **more).wait(PATIENCE_S)
    [args] = cluster.called("srun")
    start = args.index("python")
    assert args[start + 2 :] == [
        *("--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"),
        *("--rdzv_endpoint", "127.0.0.1:24217", "--rdzv_id", "4217-3"),
        *("--rdzv_conf", "read_timeout=600", *words),
    ]
    assert {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2"} <= set(args[:start])
    assert args[start - 2 : start] == ["--container-image=rlhf", "--label"]


def test_a_crash_is_started_again_on_the_same_nodes_when_asked_for(cluster, tmp_path):
    """By deploy/run.sh, which sees no new step here, and says so."""
    cluster.ends = [1]
    words = ["ppo_train.py", "--actor_save_dir", str(tmp_path / "out")]
    script = cluster.run(SCRIPT, *words, **job(), MAX_RESTARTS="3")
    assert script.wait(PATIENCE_S) == 1
    assert "ended with 1 and saved no new step" in cluster.said()
    [args] = cluster.called("srun")
    assert args[-len(words) :] == words


def test_outside_of_a_job_it_says_how_to_submit_it():
    done = subprocess.run([SCRIPT, "ppo_train.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "sbatch --nodes N deploy/slurm.sh" in done.stderr


def test_its_directives_are_read_and_leave_time_to_save():
    lines = Path(SCRIPT).read_text().splitlines()
    directives = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last < commands[0], "sbatch reads none that come after a command"
    assert {"--ntasks-per-node=1", "--signal=B:TERM@600", "--requeue"} <= set(directives)
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
