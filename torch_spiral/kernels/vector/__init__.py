"""Contractions of the `vector` schedule class, OpenCL on CPU devices: modules gemm, conv and attention.

Every builder's docstring gives its buffers, its scalars in launch order (64-bit ones first), and its grid.
"""
