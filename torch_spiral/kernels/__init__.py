"""Kernels: typed expressions (ir), emitters for each kernel language, and builders of whole kernels."""

from .builder import KernelBuilder
from .emit import BufferDecl, ScalarDecl, header
from .kernel import DTYPES, Kernel, Target, Unsupported, bits_dtype, compute_dtype, itemsize

__all__ = [
    "DTYPES", "BufferDecl", "Kernel", "KernelBuilder", "ScalarDecl", "Target", "Unsupported",
    "bits_dtype", "compute_dtype", "header", "itemsize",
]  # fmt: skip
