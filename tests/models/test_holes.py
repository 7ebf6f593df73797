"""Ids that no text has cannot be sampled or learned from, wherever they lie and at any degree."""

import pytest
import torch

from src.models.config import ModelConfig
from src.models.transformer import IMPOSSIBLE, build

SIZE, DIM = 18, 8


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("n", (1, 2, 4))
@pytest.mark.parametrize(
    "ranges", [(), ((15, 18),), ((0, 2), (4, 6), (9, 10)), ((3, 12),), ((1, 3), (7, 18))]
)
def test_their_logits_are_impossible(ranges, n, tied):
    config = ModelConfig(
        DIM, 1, 4, 4, 2, 16, SIZE, ids_without_text=ranges, tie_word_embeddings=tied
    )
    whole = torch.randn(SIZE, DIM, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(5, DIM, generator=torch.Generator().manual_seed(1))
    columns = []
    for rank in range(n):
        model = build(config, rank, n, torch.float32).to_empty(device="cpu")
        part = model.vocabulary_weight.data
        first = rank * len(part)
        part.fill_(100.0)  # padding
        part[: max(SIZE - first, 0)] = whole[first : first + len(part)]
        columns.append(model.logits(hidden).detach())
    logits = torch.cat(columns, -1)
    without = {i for start, stop in ranges for i in range(start, stop)}
    for i in range(logits.size(-1)):
        wanted = hidden @ whole[i] if i < SIZE and i not in without else None
        if wanted is None:
            assert (logits[:, i] == IMPOSSIBLE).all(), i
        else:
            torch.testing.assert_close(logits[:, i], wanted)
