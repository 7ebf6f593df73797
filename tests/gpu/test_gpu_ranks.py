"""Two ranks that share the device, over gloo: NCCL takes one rank of a GPU only."""

from tests.launch import launch


def test_two_ranks_on_one_device(device):
    done = launch(2, "tests/gpu/ranks_worker.py", device.type)
    assert "the same as one on the CPU" in done.stdout
