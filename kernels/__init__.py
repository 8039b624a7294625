"""Triton kernels, installed as ``ndm_fast.kernels``. Nothing here imports triton before it is needed."""
