"""Triton kernels for the GPU, each beside a plain PyTorch function of the same signature.

Whoever calls them imports them where a CUDA tensor is met: Triton comes with PyTorch's CUDA builds
only.
"""
