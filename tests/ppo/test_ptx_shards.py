"""Texts from shards beside the policy's steps: the gradient that transformers has of them."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from src.checkpoint.load import load_model
from src.checkpoint.source import Checkpoint
from src.data.stream import Stream
from src.ppo.pretraining import PretrainingMix
from src.ppo.roles import Role
from src.settings.declaration import build
from src.settings.ppo import PPOSettings
from src.trainer.optimizer import Optimizer
from tests.data.test_stream import write_shards
from tests.trainer.tiny import VOCAB, save_llama

ROW, BATCH, COEF = 12, 3, 0.4


def test_each_step_has_the_next_rows(tmp_path, parallel):
    documents = [[1, *range(3, 3 + number % 17), 2] for number in range(1, 40)]
    assert max(map(max, documents)) < VOCAB
    folder = str(write_shards(tmp_path / "shards", documents))
    save_llama(tmp_path / "model")
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    model = load_model(checkpoint, parallel, torch.float32)
    settings = build(PPOSettings, dict(ptx_file=folder, ptx_coef=COEF, max_batch_size=2))
    role = Role("policy", model, parallel, Optimizer(model, parallel))
    stream = Stream.open(folder, ROW, seed=settings.run.seed)
    mix = PretrainingMix(stream, BATCH, settings, parallel.device)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model")

    string = [i for ids in documents for i in ids]
    owners = [number for number, ids in enumerate(documents) for _ in ids]
    for step in (0, 1, 25):  # 25: also after a resume, in another epoch
        mix.batches.wind_to(step)
        model.zero_grad()
        loss = mix.backward(role)["ptx_loss"]
        sums, count = torch.zeros(()), 0
        for number in range(step * BATCH, (step + 1) * BATCH):
            first = stream.place(number)[1] * (ROW - 1)
            row, of = string[first : first + ROW], owners[first : first + ROW]
            for owner in sorted(set(of)):
                ids = torch.tensor([[i for i, o in zip(row, of) if o == owner]])
                logits = theirs(ids).logits[0, :-1]
                sums = sums + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
                count += ids.shape[1] - 1
        theirs.zero_grad()
        (COEF * sums / count).backward()
        assert float(loss) == pytest.approx(float(sums.detach()) / count, rel=1e-5)
        torch.testing.assert_close(model.output.weight.grad, theirs.lm_head.weight.grad)
