"""The stages of benchmarks/gpu.py, each of which measures in a process of its own."""
