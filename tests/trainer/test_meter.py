"""FLOP/s beside what a data sheet promises."""

import pytest
import torch

from src.trainer.meter import Meter, published_rate
from src.trainer.solver import SolverObjective
from tests.trainer.tiny import ours, save_llama, some_sequences

DEVICES = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": None,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A10": None,
    "NVIDIA GH200 480GB": None,
    "": None,
}


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_is_known_by_its_name(name):
    assert published_rate(name, torch.bfloat16) == DEVICES[name]
    assert published_rate(name, torch.float32) is None


def test_mfu_is_of_the_measured_rate_and_of_the_published_one(tmp_path, parallel):
    model = ours(save_llama(tmp_path / "lm"), parallel)
    meter = Meter(model, SolverObjective(some_sequences(4), parallel.device), parallel)
    meter.start()
    assert "mfu_published" not in meter.read([0, 1]), "the CPU's is not known"
    meter.published = 10 * meter.rate
    read = meter.read([0, 1])
    assert read["mfu_published"] == pytest.approx(read["mfu"] / 10)
