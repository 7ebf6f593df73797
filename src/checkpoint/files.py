"""Tensors in files, read a slice at a time: `.safetensors`, and torch's `.pth` / `.bin`, mapped.

For `.gguf` see gguf.py.
"""

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from src.checkpoint.json_file import read_json
from src.errors import UserError

# By their names in safetensors' headers.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Under what Lightning, DeepSpeed and others keep the weights in a dictionary of more.
NESTED = ("state_dict", "model_state_dict", "model", "module")


class TensorFile:
    """A file of named tensors, opened lazily.

    Only plain tensors are ever unpickled (`weights_only=True`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        self._opened: safe_open | dict[str, Tensor] | None = None
        self.keys = list(self._handle.keys() if self.lazy else self._tensors)

    def _open(self):
        """The file's handle, or its tensors: opened at the first use, and again after `release`."""
        if self._opened is None:
            try:
                self._opened = (
                    safe_open(self.path, framework="pt") if self.lazy else _unpickle(self.path)
                )
            except UserError:
                raise
            except Exception as error:  # a damaged pickle raises whatever its bytes lead to
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(
                    f"{self.path}: cannot be read as {self.path.suffix[1:]}, "
                    f"is it damaged or cut short? ({reason})"
                ) from None
        return self._opened

    # The same under two names: safetensors' handle where `lazy`, torch's dictionary elsewhere.
    _handle = _tensors = property(_open)

    def release(self) -> None:
        """Let go of the mapped pages, which count as this process's memory."""
        self._opened = None

    @property
    def lazy(self) -> bool:
        return self.path.suffix == ".safetensors"

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(
            self._handle.get_slice(key).get_shape() if self.lazy else self._tensors[key].shape
        )

    def dtype(self, key: str) -> torch.dtype | None:
        """None when it is not one that weights have here: fp32, bf16 or fp16."""
        if self.lazy:
            return DTYPES.get(self._handle.get_slice(key).get_dtype())
        dtype = self._tensors[key].dtype
        return dtype if dtype in DTYPES.values() else None

    def dtype_name(self, key: str) -> str:
        """Whatever it is, for messages."""
        if self.lazy:
            return self._handle.get_slice(key).get_dtype()
        return str(self._tensors[key].dtype).removeprefix("torch.")

    def read(self, key: str, cuts: dict[int, tuple[int, int]] | None = None) -> Tensor:
        """The tensor, or its [start, stop) along each dim of `cuts`.

        Torch files give views of the mapped file, which keep its pages in memory.
        """
        if not self.lazy:
            tensor = self._tensors[key]
            for dim, (start, stop) in (cuts or {}).items():
                tensor = tensor.narrow(dim, start, stop - start)
            return tensor
        if not cuts:
            return self._handle.get_tensor(key)
        return self._handle.get_slice(key)[
            tuple(slice(*cuts[dim]) if dim in cuts else slice(None) for dim in range(max(cuts) + 1))
        ]


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        # torch's format before 1.6, which cannot be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path}: holds a {type(loaded).__name__}, no dictionary of tensors; "
            "export the model's state_dict alone"
        )
    if _are_tensors(loaded):
        return loaded
    # A trainer's file has the weights under one key, its optimizer and counters under others.
    nested = [key for key in NESTED if _are_tensors(loaded.get(key))]
    if len(nested) == 1:
        return loaded[nested[0]]
    other = next(key for key, x in loaded.items() if not isinstance(x, Tensor))
    found = f"weights under each of {', '.join(nested)}" if nested else f"{other!r}, no tensor,"
    raise UserError(
        f"{path}: holds no plain dictionary of tensors, but {found} among its "
        f"{len(loaded)} keys; export the model's state_dict alone"
    )


def _are_tensors(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and isinstance(x, Tensor) for key, x in value.items())
    )


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a `.safetensors` file with the permissions that any new file has.

    The library leaves its files to the owner alone.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def indexed_files(folder: Path, index: Path) -> dict[str, Path]:
    """Which file an index's `weight_map` names for each tensor.

    Names may not lead out of the folder; the files need not be there.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map in it")
    for key, name in weight_map.items():
        # Only the name is checked: in a hub's cache the files are links to blobs outside.
        if (
            not isinstance(name, str)
            or os.path.isabs(name)
            or ".." in Path(name).parts
            or Path(name).name != name
        ):
            raise UserError(f"{index}: {key} lies in {name!r}, which is outside the folder")
    return {key: folder / name for key, name in weight_map.items()}
