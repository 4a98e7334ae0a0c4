"""Declared host operators: algorithms that belong on the CPU. Their inputs are copied there, upstream's kernel runs, and the
results are copied back. They are no fallback: they are listed here, never refused, and counted with the bytes they copy
(`torch.spiral.host_ops()`)."""

from __future__ import annotations

from .. import _C
from ..lowering import registered


def host(*overloads: str) -> None:
    """Declares overloads of aten to be host operators."""
    for name in overloads:
        if name in registered:
            raise RuntimeError(f"{name} is registered twice")
        registered[name] = "host"
        _C.register_host(name)


# Iterative eigenvalue algorithms, sequential and branching; what they cost is mostly not the copies.
host("linalg_eig", "linalg_eig.out", "_linalg_eigvals", "linalg_eigvals.out")
host("_linalg_eigh.eigenvalues")
host("_linalg_svd.U")
# Rank-revealing drivers (gelsy, gelsd, gelss), that upstream has on the CPU alone.
host("linalg_lstsq.out")
# Bunch-Kaufman pivoting decides element by element.
host("linalg_ldl_factor_ex.out", "linalg_ldl_solve.out")
# Gradients of drawn gamma and Dirichlet numbers by their parameters: each element takes the series, expansion or fit in float64
# that its size asks for.
host("_standard_gamma_grad", "_dirichlet_grad")
