"""A plugin of pytest: what goes through the kernels on a GPU does so on the CPU, too."""

from src.kernels import runtime

runtime.takes = lambda x: True
