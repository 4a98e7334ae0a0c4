"""Contraction kernels of the vector class alone, against torch on the CPU in the same process, without the runtime.

python -m benchmarks.kernels_vector [gemm] [linear] [gemv] [attention] [conv] [depthwise]

Every line: median of the paired ratios torch / ours over interleaved runs, and the best time of each.
"""
# ruff: noqa: B023, E731 (every closure is called within its own iteration; lists of scalars stay on a line)

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from kernel_runner import _opencl, _opencl_program, params, targets

from torch_spiral.kernels import Kernel
from torch_spiral.kernels.vector import attention as A
from torch_spiral.kernels.vector import conv as C
from torch_spiral.kernels.vector import gemm as G

TARGET = targets()["opencl-vector"]
UNITS = 2
REPEATS = 15


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def buffer(x: torch.Tensor | int) -> Any:
    """A buffer with a tensor's contents, or of so many f32 elements."""
    import pyopencl as cl

    flags = cl.mem_flags.READ_WRITE
    if isinstance(x, int):
        return cl.Buffer(_opencl()[0], flags, 4 * x)
    return cl.Buffer(_opencl()[0], flags | cl.mem_flags.COPY_HOST_PTR, hostbuf=x.detach().contiguous().numpy())


def launcher(
    kernel: Kernel, buffers: list[Any], scalars: list[Any], groups: tuple[int, int, int]
) -> Callable[[], None]:
    import pyopencl as cl

    function = cl.Kernel(_opencl_program(kernel.source), kernel.entry)
    function.set_args(*buffers, np.frombuffer(params(kernel, [0] * len(buffers), scalars), np.uint8))

    def launch(keep: list[Any] = buffers) -> None:  # an argument is not retained by its kernel
        cl.enqueue_nd_range_kernel(_opencl()[1], function, groups, kernel.workgroup)

    return launch


def compare(name: str, launches: list[Callable[[], None]], reference: Callable[[], Any], flops: float = 0) -> None:
    def ours() -> None:
        for launch in launches:
            launch()
        _opencl()[1].finish()

    for _ in range(2):
        ours(), reference()
    a, b = [], []
    for _ in range(REPEATS):
        t0 = time.perf_counter()
        ours()
        t1 = time.perf_counter()
        reference()
        a.append(t1 - t0)
        b.append(time.perf_counter() - t1)
    rate = f"  {flops / min(a) / 1e9:.0f} against {flops / min(b) / 1e9:.0f} GFLOP/s" if flops else ""
    print(
        f"{name:44} {median(y / x for x, y in zip(a, b, strict=False)):5.2f}x  best {min(a) * 1e3:8.3f} ms, torch {min(b) * 1e3:8.3f} ms{rate}",
        flush=True,
    )


def gemm() -> None:
    s, kernel = G.schedule(), G.gemm(TARGET, "f32", "f32", "f32")
    pack = G.pack_b(TARGET, "f32", "n", s)
    for n in (512, 1024, 1400, 2048, 3072):
        a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
        bc, p = buffer(n * n), buffer(n * cdiv(n, s.nr) * s.nr)
        compare(f"matmul {n}", [
            launcher(pack, [buffer(b), p], [0, 0, n, 1, 1, n, n], (2, 4, 1)),
            launcher(kernel, [buffer(a), p, bc], [0, n, 1, 0, 0, 0, n, 1, n, n, n], G.gemm_groups(s, n, n, 1, UNITS)),
        ], lambda: torch.mm(a, b, out=c), 2 * n**3)  # fmt: skip


def linear() -> None:
    s = G.schedule()
    for m, n, k in ((128, 768, 768), (16, 1024, 1024), (128, 3072, 768)):
        x, w, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
        bx, bw, bc, p = buffer(x), buffer(w), buffer(m * n), buffer(k * cdiv(n, s.nr) * s.nr)
        reference = lambda: torch.mm(x, w.t(), out=out)
        compare(f"linear {m}x{n}x{k}, dot products", [launcher(
            G.gemm_dot(TARGET, "f32", "f32", "f32"), [bx, bw, bc], [0, k, 0, k, 0, n, 1, m, n, k], G.gemm_dot_groups(m, n, 1, UNITS))],
            reference, 2 * m * n * k)  # fmt: skip
        launcher(G.pack_b(TARGET, "f32", "t", s), [bw, p], [0, 0, 1, k, 1, k, n], (4, 1, 1))()
        compare(f"linear {m}x{n}x{k}, weight packed once", [launcher(
            G.gemm(TARGET, "f32", "f32", "f32"), [bx, p, bc], [0, k, 1, 0, 0, 0, n, 1, m, n, k], G.gemm_groups_wide(s, m, n, 1, UNITS))],
            reference, 2 * m * n * k)  # fmt: skip


def gemv() -> None:
    for n, k in ((2304, 768), (768, 3072), (50257, 768)):
        x, w, out = torch.randn(1, k), torch.randn(n, k), torch.empty(1, n)
        wt = w.t().contiguous()
        bx, bc = buffer(x), buffer(n)
        compare(f"vector x {n}x{k} transposed", [launcher(
            G.gemm_dot(TARGET, "f32", "f32", "f32", 1), [bx, buffer(w), bc], [0, k, 0, k, 0, n, 1, 1, n, k], G.gemm_dot_groups(1, n, 1, UNITS))],
            lambda: torch.mm(x, w.t(), out=out))  # fmt: skip
        compare(f"vector x {k}x{n}", [launcher(
            G.gemv(TARGET, "f32", "f32", "f32"), [bx, buffer(wt), bc], [0, 1, 0, n, 0, 1, n, k], (1, 2 * cdiv(n, 4096), 1))],
            lambda: torch.mm(x, wt, out=out))  # fmt: skip


def attention() -> None:
    nr = G.block_schedule().nr
    for h, t, d, causal in ((12, 1024, 64, True), (12, 128, 64, False), (12, 197, 64, False)):
        q, k, v, g = (torch.randn(1, h, t, d, requires_grad=i < 3) for i in range(4))
        strides, tail = [h * t * d, t * d, d], [h, 1, t, t, d, d, *([0] if causal else []), d**-0.5]
        bq, bk, bv, bg, o, dq, dk, dv = (*(buffer(x) for x in (q, k, v, g)), *(buffer(h * t * d) for _ in range(4)))
        lse, delta = buffer(h * t), buffer(h * 2 * cdiv(t, 64) * 64)
        packing = []

        def columns(x: Any) -> Any:
            p = buffer(h * cdiv(t, nr) * nr * d)
            packing.append(
                launcher(A.pack_columns(TARGET, "f32"), [x, p], [*strides[:2], 1, d, h, d, t], (max(1, t // 256), 1, h))
            )
            return p

        def rows(x: Any) -> Any:
            p = buffer(h * t * cdiv(d, nr) * nr)
            packing.append(
                launcher(A.pack_rows(TARGET, "f32"), [x, p], [*strides, 1, h, t, d], (1, max(1, t // 256), h))
            )
            return p

        grid = (cdiv(t, 48), h, 1)
        kc, vr = columns(bk), rows(bv)
        forward = [
            *packing,
            launcher(A.attention_forward(TARGET, "f32", causal), [bq, kc, vr, o, lse], strides * 2 + tail, grid),
        ]
        sdpa = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        with torch.no_grad():
            compare(f"attention H{h} T{t} D{d}{' causal' if causal else ''}", forward, sdpa)
        packing.clear()
        vc, kr, sums = columns(bv), rows(bk), [buffer(h * A.sums(t, d)) for _ in range(2)]
        backward = [
            launcher(A.attention_delta(TARGET, "f32"), [o, bg, lse, delta], [*strides * 2, h, t, d], (cdiv(t, 64), h, 1)), *packing,
            launcher(A.attention_backward(TARGET, "f32", causal), [bq, bg, kc, vc, delta, kr, dq, *sums], strides * 3 + tail, (1, h, 1)),
            launcher(A.attention_backward_sum(TARGET, "f32"), [*sums, dk, dv], [*strides * 2, 1, h, t, d, d, d**-0.5], (cdiv(t, 64), h, 1)),
        ]  # fmt: skip
        compare("  forward and backward", forward + backward, lambda: torch.autograd.grad(sdpa(), (q, k, v), g))


def conv() -> None:
    s = C.conv_schedule()
    for n, ci, co, size, k, stride in ((8, 64, 64, 56, 3, 1), (1, 64, 64, 56, 3, 1), (1, 128, 128, 28, 3, 1), (1, 512, 512, 7, 3, 1),
                                       (8, 256, 256, 14, 3, 1), (1, 3, 64, 224, 7, 2), (1, 64, 128, 56, 3, 2)):  # fmt: skip
        x, w, p = (
            torch.randn(n, ci, size, size, requires_grad=True),
            (torch.randn(co, ci, k, k) * 0.05).requires_grad_(),
            k // 2,
        )
        y = F.conv2d(x, w, stride=stride, padding=p)
        g, o, e, kk = torch.randn(y.shape), y.shape[2], size + 2 * p, ci * k * k
        bx, bg, X, W, out = (
            buffer(x),
            buffer(g),
            buffer(n * ci * e * e + C.SLACK),
            buffer(cdiv(co, s.mr) * s.mr * kk),
            buffer(y.numel()),
        )
        geometry = [1, o, o, 1, k, k, 1, e, e, 1, stride, stride, 1, 1, 1, kk, ci]
        pad = launcher(
            C.pad(TARGET, "f32"),
            [bx, X],
            [ci * size * size, size * size, 0, size, 1, ci, 1, size, size, 1, e, e, 1, 1, 1, 0, p, p],
            (2, n, 1),
        )
        launcher(
            C.pack_weights(TARGET, "f32"), [buffer(w), W], [0, 0, kk, k * k, 0, k, 1, co, kk, 1, k, k], (2, 1, 1)
        )()
        run = launcher(
            C.conv(TARGET, "f32"),
            [X, W, out],
            [ci * e * e, co * o * o, o * o, 0, o, 1, co, 1, *geometry],
            C.conv_groups(co, o * o, n, 1, s, UNITS),
        )
        name, flops = f"conv {k}x{k}/{stride} {ci}->{co} {size}^2 b{n}", 2 * n * o * o * co * kk
        with torch.no_grad():
            compare(name, [pad, run], lambda: F.conv2d(x, w, stride=stride, padding=p), flops)
        run = launcher(
            C.conv_backward_weight(TARGET, "f32"),
            [X, bg, buffer(co * kk)],
            [ci * e * e, co * o * o, o * o, co, 1, n, *geometry],
            (2, 1, 1),
        )
        compare("  gradient of the weight", [pad, run], lambda: torch.autograd.grad(y, w, g, retain_graph=True), flops)
        if stride == 1:
            run = launcher(
                C.conv(TARGET, "f32"),
                [X, W, out],
                [ci * e * e, co * o * o, o * o, 0, o, 1, co, 1, *geometry],
                C.conv_groups(co, o * o, n, 1, s, UNITS),
            )
            compare(
                "  gradient of the input (square case)",
                [pad, run],
                lambda: torch.autograd.grad(y, x, g, retain_graph=True),
                flops,
            )


def depthwise() -> None:
    for n, c, size, k, stride in ((8, 96, 112, 3, 2), (1, 144, 56, 3, 1), (1, 960, 7, 3, 1), (1, 240, 28, 5, 1)):
        x, w, p = torch.randn(n, c, size, size), torch.randn(c, 1, k, k), k // 2
        e, o = size + 2 * p, (size + 2 * p - k) // stride + 1
        bx, bw, X, out = buffer(x), buffer(w), buffer(n * c * e * e + C.SLACK), buffer(n * c * o * o)
        compare(f"depthwise {k}x{k}/{stride} {c} {size}^2 b{n}", [
            launcher(C.pad(TARGET, "f32"), [bx, X], [c * size * size, size * size, 0, size, 1, c, 1, size, size, 1, e, e, 1, 1, 1, 0, p, p], (2, n, 1)),
            launcher(C.depthwise(TARGET, "f32", (k, k)), [X, bw, out], [0, k * k, k, 1, c * o * o, o * o, o, c, 1, o, o, e, e, stride, stride, 1, 1], (2, n, 1)),
        ], lambda: F.conv2d(x, w, padding=p, stride=stride, groups=c))  # fmt: skip


SUITES = {f.__name__: f for f in (gemm, linear, gemv, attention, conv, depthwise)}


if __name__ == "__main__":
    torch.set_num_threads(UNITS)
    for chosen in sys.argv[1:] or SUITES:
        SUITES[chosen]()
