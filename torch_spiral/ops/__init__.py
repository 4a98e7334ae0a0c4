"""What each op computes, a module per family. Importing one registers its ops."""

from importlib import import_module

FAMILIES = ("pointwise", "matmul", "reduce", "norms", "conv", "activation", "index", "attention", "rnn", "random", "pooling")

for _family in FAMILIES:
    import_module(f"{__name__}.{_family}")
