"""NCCL's record of what hung: on unless the user says otherwise, and named in the message."""

import os

import torch

from src.parallel.flight_recorder import DUMP_ON_TIMEOUT, EVENTS, PREFIX, dumps, turn_on
from src.parallel.roll_call import lost


def test_it_is_on_and_writes_to_a_file_of_the_run_on_each_rank():
    one, other = {"MASTER_PORT": "29500"}, {"MASTER_PORT": "29501"}
    turn_on(one), turn_on(other)
    assert one["TORCH_FR_BUFFER_SIZE"] == one["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "2000"
    assert one["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert one["TORCH_FR_DUMP_TEMP_FILE"] == one["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
    assert dumps(one) == one["TORCH_FR_DUMP_TEMP_FILE"] + "N" and "29500" in dumps(one)
    assert os.path.isdir(os.path.dirname(dumps(one))), "PyTorch makes no folder"
    assert dumps(one) != dumps(other)


def test_what_the_user_has_set_stays_under_both_names():
    given = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/logs/nccl_"}
    turn_on(given)
    assert given["TORCH_FR_BUFFER_SIZE"] == "7" and dumps(given) == "/logs/nccl_N"
    for off in ({"TORCH_FR_BUFFER_SIZE": "0"}, {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}):
        turn_on(off)
        assert dumps(off) is None


def test_the_names_are_those_that_this_pytorch_reads():
    """They stand in its library, whatever it was built for."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    library = next(os.path.join(folder, n) for n in os.listdir(folder) if "torch_cpu" in n)
    with open(library, "rb") as file:
        content = file.read()
    for name in (EVENTS[0], PREFIX[0], PREFIX[1]):
        assert name.encode() in content, name
    headers = os.path.join(os.path.dirname(torch.__file__), "include/torch/csrc/distributed/c10d")
    with open(os.path.join(headers, "ProcessGroupNCCL.hpp")) as file:
        text = file.read()
    assert f'"{DUMP_ON_TIMEOUT[0]}"' in text and f'"{EVENTS[1]}"' in text


def test_the_message_about_a_lost_rank_names_the_files(monkeypatch):
    for name in (*EVENTS, *DUMP_ON_TIMEOUT, *PREFIX):
        monkeypatch.delenv(name, raising=False)
    assert "flight recorder" not in lost([3], 8)
    for name, value in ((EVENTS[0], "2000"), (DUMP_ON_TIMEOUT[0], "1"), (PREFIX[0], "/tmp/fr-")):
        monkeypatch.setenv(name, value)
    message = lost([3], 8)
    assert message.startswith("error: rank 3 of 8 did not come to") and "/tmp/fr-N" in message
