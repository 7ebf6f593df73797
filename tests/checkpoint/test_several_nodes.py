"""Steps and models on nodes that share no folder: whole on what is left of them, or named."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from src.checkpoint.manifest import described_all, problems, read_manifest, write_manifest
from src.checkpoint.nodes import Nodes
from src.checkpoint.source import Checkpoint
from src.checkpoint.verify import step_report
from src.errors import UserError
from src.settings.training import SavingSettings
from tests.launch import launch
from tests.trainer.tiny import save_llama

RANKS = range(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    save_llama(folder / "lm")
    launch(4, "tests/checkpoint/nodes_worker.py", folder, timeout=480)
    return folder


@pytest.fixture(scope="module", params=[2, 1], ids=["two nodes of two", "four of one"])
def seen(request, folder):
    """What ranks saw by name, and how many a node has."""
    by_name = json.loads((folder / "nodes.json").read_text())[str(request.param)]
    return SimpleNamespace(per_node=request.param, count=4 // request.param, **{"of": by_name})


def names_of(rank: int) -> set[str]:
    return {f"model.mp-00.dp-0{rank}.safetensors", f"random.dp-0{rank}.safetensors"}


def on_node(node: int, seen) -> set[str]:
    """What lies there: its own ranks' files, and those of the node before it."""
    before = (node - 1) % seen.count
    return set().union(*(names_of(r) for r in RANKS if r // seen.per_node in (node, before)))


def test_who_sees_what_is_found_out_and_nothing_stays(seen):
    assert seen.of["of_rank"] == [[rank // seen.per_node for rank in RANKS]] * 4
    assert seen.of["left by the probe"] == [[]] * 4
    assert seen.of["shared"] == [[True, seen.count]] * 4


def test_each_file_lies_on_two_nodes_and_the_manifest_says_on_which(seen):
    assert seen.of["steps"] == [["step-00000002", "step-00000003"]] * 4, "--keep 2, on each"
    manifests = seen.of["manifest"]
    for rank, manifest in enumerate(manifests):
        node = rank // seen.per_node
        assert manifest.pop("node") == node and len(manifest["nodes"]) == seen.count
        assert set(seen.of["files"][rank]) == on_node(node, seen)
        said = {name for name, entry in manifest["files"].items() if node in entry["nodes"]}
        assert said == on_node(node, seen)
    assert all(manifest == manifests[0] for manifest in manifests), "alike on all nodes"
    assert manifests[0]["parts"] == {} and seen.of["facts"] == [3] * 4
    assert manifests[0]["files"].keys() == set().union(*map(names_of, RANKS))


def test_a_step_is_whole_on_what_is_left(seen):
    """The last node comes with an empty disk: it gets what its ranks want from who has it."""
    for moment in ("newest", "newest, a disk lost"):
        assert seen.of[moment] == [["out-state/step-00000003", 0]] * 4
    last = seen.count - 1
    for rank in RANKS:
        for name, nodes in seen.of["holders"][rank][0].items():
            assert nodes == [n for n in range(seen.count) if name in on_node(n, seen)]
            assert seen.of["holders, a disk lost"][rank][name] == [n for n in nodes if n != last]
    wanted = set().union(*(names_of(r) for r in RANKS if r // seen.per_node == last))
    entries = seen.of["manifest"][0]["files"]
    total = sum(entries[name]["size"] for name in wanted)
    assert seen.of["fetched"] == [[len(wanted), total]] * 4
    for rank in RANKS:
        came = {} if rank // seen.per_node != last else {n: entries[n] for n in wanted}
        got = seen.of["fetched files"][rank]
        assert got.keys() == came.keys()
        assert all(got[n]["sha256"] == came[n]["sha256"] for n in came)
    for keys in seen.of["keys"]:
        assert keys["model.mp-00.dp-02.safetensors"] == ["weight/2"] and len(keys) == 8


def test_a_step_that_one_node_has_renamed_is_finished_by_the_others(seen):
    """And one that none has renamed is none, on all nodes alike."""
    assert seen.of["newest, half renamed"] == [["out-state/step-00000004", 0]] * 4
    for rank in RANKS:
        assert "step-00000004" in seen.of["finished"][rank]
        assert (".tmp-step-00000009" in seen.of["finished"][rank]) == (rank < seen.per_node)
        assert not [name for name in seen.of["swept"][rank] if name.startswith(".tmp")]


def test_another_step_of_the_same_number_is_set_aside(seen):
    assert len(set(seen.of["reader of two"])) == 1
    for rank, aside in enumerate(seen.of["aside"]):
        is_first, last = rank % seen.per_node == 0, rank // seen.per_node == seen.count - 1
        other = ["step-00000003"] if last else []
        assert aside == ([*other, "step-00000004"] if is_first else [])


def test_a_damaged_copy_is_passed_over_and_the_last_one_named(seen):
    name = "model.mp-00.dp-00.safetensors"
    for held, damage in seen.of["one copy damaged"]:
        assert held[name] == [1] and len(damage) == 1
        assert f"step-00000005/{name}: its SHA-256 is not that" in damage[0]
    again = seen.of["fetched again"]
    assert list(again[0]) == [name] and again[1:] == [{}] * 3
    for message in seen.of["both damaged"]:
        assert f"step-00000005/{name}: its SHA-256 is not that of what was written" in message
    for message in seen.of["both gone"]:
        nodes = r"they were on node 0 ("
        assert f"1 of 8 files are on none of the nodes of this run: {name}; {nodes}" in message
        assert "and node 1 (" in message
    assert "--resume out-state/step-00000003 goes on from there" in seen.of["both gone"][0]


def test_files_go_in_pieces_and_arrive_as_they_are(folder):
    seen = json.loads((folder / "nodes.json").read_text())["1"]
    size = 2 * 2**24 + 5
    assert seen["came"] == [0, 0, size, size]
    assert seen["arrived"] == [{}, {}, {"large": True, "empty": True}, {"large": True}]
    for rank in RANKS:
        assert "to/large: came otherwise from rank 1 than the manifest says" in seen["wrong"][rank]
        assert seen["lost"][rank] == "from/nowhere: cannot be read: No such file or directory"


def test_a_model_of_several_nodes_is_saved_on_the_first(folder, seen):
    for rank in RANKS:
        shards = [name for name in seen.of["model"][rank] if name.startswith("consolidated")]
        assert len(shards) == (4 if rank < seen.per_node else 0)
        rest = seen.of["around the model"][rank]
        assert rest == (["model"] if rank < seen.per_node else []), "nothing temporary stays"
    saved = folder / f"model of {seen.per_node}"
    assert problems(saved, read_manifest(saved)) == []
    a, b = Checkpoint.open(str(saved)), Checkpoint.open(str(folder / "lm"))
    assert a.table.keys() == b.table.keys()
    assert all(torch.equal(a.read(name), b.read(name)) for name in b.table)


def test_one_launcher_shares_whatever_there_is(parallel, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    nodes = Nodes.find(tmp_path / "nowhere" / "state", parallel)
    assert nodes.are_one and nodes.is_first and nodes.part == (0, 1) and nodes.launchers == 1
    assert not os.listdir(tmp_path)


def a_part(folder: Path, **more) -> Path:
    """The step of node 1 of two: one file is its own, one both have, one is not its."""
    folder = folder / "step-00000005"
    folder.mkdir()
    names = ["random.dp-00.safetensors", *(f"model.mp-00.dp-0{i}.safetensors" for i in (0, 1))]
    for name in names:
        save_file({"x": torch.ones(3)}, folder / name)
    entries = described_all(folder)
    for name, nodes in zip(names, ([0, 1], [0], [1])):
        entries[name]["nodes"] = nodes
    (folder / names[1]).unlink()
    facts = {"settings": {}, "layouts": {"model": {"mp": 1, "dp": 2}}, "counters": {}, "parts": {}}
    nodes = {"nodes": ["node 0 (a)", "node 1 (b)"], "node": 1}
    write_manifest(folder, entries, step=5, **(facts | nodes | more))
    return folder


def test_a_node_s_part_is_verified_without_what_others_have(tmp_path):
    folder = a_part(tmp_path)
    report = step_report(folder)
    assert report.problems == [] and "2 of 3 files are this node's" in report.summary
    (folder / "model.mp-00.dp-01.safetensors").unlink()
    assert any("dp-01.safetensors: missing" in line for line in step_report(folder).problems)


@pytest.mark.parametrize(
    "more",
    [{"node": 2}, {"node": None}, {"nodes": [], "node": 0}, {"nodes": [1, 2]}, {"nodes": "ab"}],
)
def test_nodes_that_cannot_be_are_refused(tmp_path, more):
    with pytest.raises(UserError, match="its list of nodes is damaged"):
        read_manifest(a_part(tmp_path, **more))


def test_how_many_nodes_get_a_file():
    given = {None: [1, 2, 2, 2], 1: [1, 1, 1, 1], 3: [1, 2, 3, 3]}
    for asked, copies in given.items():
        settings = SavingSettings(save_copies=asked)
        assert [settings.copies(nodes) for nodes in (1, 2, 3, 4)] == copies
