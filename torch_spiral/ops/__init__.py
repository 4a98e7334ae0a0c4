"""What each op computes, a module per family. Importing one registers its ops."""

from importlib import import_module

import torch

FAMILIES: tuple[str, ...] = (
    "pointwise",
    "matmul",
    "reduce",
    "norms",
    "losses",
    "scans",
    "conv",
    "activation",
    "index",
    "embedding",
    "segment",
    "shape",
    "factory",
    "sort",
    "attention",
    "varlen",
    "flex",
    "rnn",
    "random",
    "pooling",
    "padding",
    "resample",
    "sliding",
    "special",
    "optim",
    "foreach",
    "linalg",
    "quantized",
    "scaled",
    "grouped",
    "host",
    "fft",
    "sparse",
    "sparse_compressed",
)
if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
    FAMILIES += ("before_2_13",)

for _family in FAMILIES:
    import_module(f"{__name__}.{_family}")
