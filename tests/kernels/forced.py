"""A plugin of pytest: what stands between the products goes through the kernels on the CPU, too."""

from src.models import elementwise

elementwise._has_kernels = lambda x: True
