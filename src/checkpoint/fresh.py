"""A model that is begun from nothing, seen as a checkpoint of random weights."""

from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint.source import Checkpoint, config_of_type
from src.models.init import initial_std, random_tensor
from src.models.layout import tensor_table


class FreshCheckpoint(Checkpoint):
    """Weights by a config alone: each is drawn when it is read, alike at any degree.

    Raises UserError for a config that is damaged, or says not how many ids there are.
    """

    def __init__(self, config_file: str, model_type: str | None, seed: int) -> None:
        """model_type: whose sizes they must be, if given."""
        self.folder, self.seed = Path(config_file).parent, seed
        self.config = config_of_type(model_type, config_file)
        self.table = tensor_table(self.config)
        self.parts, self.adapter, self.gguf, self.stages = [{}], None, None, 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype

    def read(
        self, name: str, dim: int | None = None, start: int = 0, stop: int = 0, merged: bool = True
    ) -> Tensor:
        spec = self.table[name]
        config = self.config
        std = initial_std(name, spec, config.n_layers, config.tie_word_embeddings)
        whole = random_tensor(name, spec, std, self.seed)
        return whole if dim is None else whole.narrow(dim, start, stop - start)
