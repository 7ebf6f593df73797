"""ppo_train.py with layouts, as a user calls it: it saves, evaluates, and goes on in other ones."""

import json
from pathlib import Path

import pytest

from tests.launch import launch
from tests.models import families
from tests.test_families import save_tokenizer
from tests.test_scripts import flags, must, rows_of, tensors
from tests.trainer.tiny import apart

ASKED = dict(
    actor_train="tp2 on 2-3", actor_gen="dp4", critic_train="pp2 on 0-1", critic_inf="tp2"
) | dict(ref_inf="tp1 on 0-1", rew_inf="tp2 on 2-3")
OTHERS = dict(actor_train="pp2 tp2", actor_gen="tp2", critic_train="tp1 zero3", ref_inf="tp4")
# Which earlier run's second step it goes on from, and in which layouts.
RUNS = {
    "whole": (None, ASKED),
    "again": ("whole", ASKED),
    "elsewhere": ("whole", OTHERS),
    "as plain flags say": ("whole", dict(model_parallel_size=2)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The runs in one launch of four ranks."""
    root = tmp_path_factory.mktemp("layout scripts")
    launch(4, "tests/script_chain.py", prepared(root), timeout=600)
    return root


def prepared(root: Path) -> Path:
    """The file of the commands, in a folder that has what they read."""
    data, start, verifier = root / "data", root / "start", root / "verifier"
    families.save("llama", families.build("llama"), start)
    save_tokenizer(start)
    must("dataset/build.py", "arithmetic", *flags(save_dir=data, n_train=12, n_test=4))
    pairs = data / "verifier_test.json"
    commands = [["verifier_train.py", *flags(ckpt_dir=start, save_dir=verifier, train_file=pairs)]]
    ppo = dict(actor_ckpt_dir=start, critic_ckpt_dir=verifier, reward_model_ckpt_dir=verifier)
    ppo |= dict(train_file=data / "train.json", label_file=data / "test.json", task="GSM8K")
    ppo |= dict(reward="verifier,rule", max_buffer_size=8, iterations=3, mini_batches=2)
    ppo |= dict(ppo_epochs=1, max_new_tokens=6, max_seq_len=128, lr=1e-3, critic_lr=1e-3)
    ppo |= dict(save_every=1, keep=3, eval_every=3, ref_ema=0.9)
    for name, (earlier, layouts) in RUNS.items():
        out = root / name
        resume = {} if earlier is None else {"resume": root / f"{earlier}-state/step-00000002"}
        places = dict(actor_save_dir=out, critic_save_dir=root / f"{name} value")
        places |= dict(dump_rollouts=root / f"{name} rollouts")
        commands.append(["ppo_train.py", *flags(**ppo, **places, **layouts, **resume)])
    (root / "commands.json").write_text(json.dumps([[str(x) for x in c] for c in commands]))
    return root / "commands.json"


def test_a_run_goes_on_bit_for_bit_in_its_own_layouts(root):
    for suffix in ("", " value"):
        whole, again = tensors(root / f"whole{suffix}"), tensors(root / f"again{suffix}")
        assert apart(again, whole) == 0.0
        assert apart(whole, tensors(root / ("start" if not suffix else "verifier"))) > 1e-4


@pytest.mark.parametrize("name", ["elsewhere", "as plain flags say"])
def test_a_run_goes_on_in_other_layouts(root, name):
    for suffix in ("", " value"):
        assert apart(tensors(root / f"{name}{suffix}"), tensors(root / f"whole{suffix}")) < 1e-5


def test_the_log_says_who_is_where_and_what_moved(root):
    log = (root / "whole-logs" / "ppo_train.log").read_text()
    assert "actor_gen dp4 tp1 on 0-3" in log and "critic_train dp1 pp2 tp1 on 0-1" in log
    names = {name for row in rows_of(root / "whole-logs" / "ppo_train.jsonl") for name in row}
    assert {"ppo/gb/relayout", "ppo/gb/value_relayout", "ppo/seconds/relayout"} <= names
    assert any(name.startswith("eval/GSM8K") for name in names)
    texts = (root / "whole-logs" / "ppo_train.jsonl").read_text()
    assert "samples/1" in texts  # of rank 2's rollouts


def test_all_rollouts_are_dumped_by_rank_0_that_has_none(root):
    from pyarrow import parquet

    rows = parquet.read_table(root / "whole rollouts" / "iteration-000003.parquet").to_pylist()
    assert [row["place"] for row in rows] == list(range(8))
    assert all(len(row["ref_logprobs"]) == len(row["values"]) == len(row["tokens"]) for row in rows)
