"""LSTM and GRU cells: everything after the two matrix products in one kernel, and its gradient.

Gates lie side by side in rows: [B, 4 H] in the order input, forget, cell, output (LSTM), [B, 3 H] in the order reset, update,
new (GRU). What backward needs goes into a workspace, private to each pair of ops.
"""

from __future__ import annotations

from typing import Any

from ..kernels import ir
from ..lowering import Tensor, check, empty, eq, is_one, lowering
from .items import Item, each
from .reduce import add_up, reduce_rows


def _gate(it: Item, name: str, number: int) -> Any:
    """Gate `number` of this item, as stored in [B, gates * H]."""
    b, h = it.at
    return it.load(name, (b, h + it["hidden"] * number))


def _put(it: Item, name: str, number: int, value: Any) -> None:
    b, h = it.at
    it.store(name, value, (b, h + it["hidden"] * number))


def _biases(it: Item, number: int) -> Any:
    """The input's and the hidden state's bias of a gate; None where the cell has none."""
    if not it.static[0]:
        return None
    h = it.at[1] + it["hidden"] * number
    return it.load("input_bias", (h,)), it.load("hidden_bias", (h,))


def _preactivation(it: Item, number: int) -> Any:
    x = _gate(it, "input_gates", number) + _gate(it, "hidden_gates", number)
    bias = _biases(it, number)
    return x if bias is None else x + bias[0] + bias[1]


def _lstm(it: Item) -> None:
    k = it.k
    i, f, o = (k.let(ir.sigmoid(_preactivation(it, n))) for n in (0, 1, 3))
    g = k.let(ir.tanh(_preactivation(it, 2)))
    cy = k.let(f * it.load("cx") + i * g)
    it.store("out_hy", o * ir.tanh(cy))
    it.store("out_cy", cy)
    for n, gate in enumerate((i, f, g, o)):
        _put(it, "out_workspace", n, gate)


def _lstm_backward(it: Item) -> None:
    k = it.k
    has_gh, has_gc = it.static
    i, f, g, o = (_gate(it, "workspace", n) for n in range(4))
    t = k.let(ir.tanh(it.load("cy")))
    zero = ir.const(0, t.dtype)
    gh = it.load("grad_hy") if has_gh else zero
    gc = gh * o * (1.0 - t * t)
    if has_gc:
        gc = gc + it.load("grad_cy")
    gc = k.let(gc)
    gates = (gc * g * (1.0 - i) * i, gc * it.load("cx") * (1.0 - f) * f, gc * i * (1.0 - g * g), gh * t * (1.0 - o) * o)
    for n, gate in enumerate(gates):
        _put(it, "out_gates", n, gate)
    it.store("out_cx", gc * f)


def _gru(it: Item) -> None:
    k = it.k
    r, z = (k.let(ir.sigmoid(_preactivation(it, n))) for n in (0, 1))
    x, h = _gate(it, "input_gates", 2), _gate(it, "hidden_gates", 2)
    bias = _biases(it, 2)
    if bias is not None:
        x, h = x + bias[0], h + bias[1]
    h = k.let(h)
    n = k.let(ir.tanh(x + r * h))
    hx = k.let(it.load("hx"))
    it.store("out_hy", n + z * (hx - n))
    for number, value in enumerate((r, z, n, hx, h)):
        _put(it, "out_workspace", number, value)


def _gru_backward(it: Item) -> None:
    k = it.k
    r, z, n, hx, h = (k.let(_gate(it, "workspace", number)) for number in range(5))
    grad = k.let(it.load("grad_hy"))
    new = k.let(grad * (1.0 - z) * (1.0 - n * n))
    reset = k.let(new * h * (1.0 - r) * r)
    update = k.let(grad * (hx - n) * (1.0 - z) * z)
    for number, (of_input, of_hidden) in enumerate(((reset, reset), (update, update), (new, new * r))):
        _put(it, "out_input_gates", number, of_input)
        _put(it, "out_hidden_gates", number, of_hidden)
    it.store("out_hx", grad * z)


def _check_gates(name: str, count: int, input_gates: Tensor, hidden_gates: Tensor, state: Tensor) -> None:
    ok = input_gates.ndim == hidden_gates.ndim == state.ndim == 2
    check(ok, "RuntimeError", f"{name}: expected gates and states with 2 dimensions")
    for gates in (input_gates, hidden_gates):
        check(
            eq(gates.sizes[1], state.sizes[1] * count), "RuntimeError",
            f"{name}: expected {{}} columns of gates for a hidden size of {{}}, got {{}}", state.sizes[1] * count, state.sizes[1],
            gates.sizes[1],
        )  # fmt: skip
        check(eq(gates.sizes[0], state.sizes[0]), "RuntimeError", f"{name}: gates and states differ in batch size")


def _sum_of_rows(dtype: str, r: Any, x: Any) -> Any:
    return add_up(r, x, dtype)


def _bias_gradient(gates: Tensor) -> Tensor:
    out = empty((gates.sizes[1],), gates.dtype)
    sizes = (gates.sizes[0], gates.sizes[1])
    reduce_rows("sum_of_rows", _sum_of_rows, [(out, (0, 1))], [(gates, gates.strides)], sizes, 1, (gates.dtype,))
    return out


@lowering("_thnn_fused_lstm_cell")
def lstm_cell(
    input_gates: Tensor, hidden_gates: Tensor, cx: Tensor, input_bias: Tensor | None, hidden_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(hy, cy, workspace) of gates [B, 4 H], without the biases [4 H], and the cell state cx [B, H]."""
    _check_gates("_thnn_fused_lstm_cell", 4, input_gates, hidden_gates, cx)
    dtype = cx.dtype
    hy, cy, workspace = empty(cx.sizes, dtype), empty(cx.sizes, dtype), empty((cx.sizes[0], cx.sizes[1] * 4), dtype)
    operands = {"out_hy": hy, "out_cy": cy, "out_workspace": workspace}
    operands |= {"input_gates": input_gates, "hidden_gates": hidden_gates, "cx": cx}
    _cell("lstm_cell", _lstm, cx, operands, input_bias, hidden_bias)
    return hy, cy, workspace


def _each(name: str, body: Any, sizes: Any, operands: dict, static: tuple = ()) -> None:
    each(name, body, sizes, operands, {"hidden": sizes[1]}, static=static, lanes=not is_one(sizes[1]), cost=16)


def _cell(
    name: str, body: Any, state: Tensor, operands: dict, input_bias: Tensor | None, hidden_bias: Tensor | None
) -> None:
    biased = input_bias is not None and hidden_bias is not None
    if biased:
        operands |= {"input_bias": input_bias, "hidden_bias": hidden_bias}
    _each(name, body, state.sizes, operands, (biased,))


@lowering("_thnn_fused_lstm_cell_backward_impl")
def lstm_cell_backward(
    grad_hy: Tensor | None, grad_cy: Tensor | None, cx: Tensor, cy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(gradient of the gates, of cx, of a bias): both kinds of gates have the same gradient, and so have both biases."""
    if grad_hy is None and grad_cy is None:
        return None, None, None
    gates, grad_cx = empty(workspace.sizes, workspace.dtype), empty(cx.sizes, cx.dtype)
    operands = {"out_gates": gates, "out_cx": grad_cx, "workspace": workspace, "cx": cx, "cy": cy}
    if grad_hy is not None:
        operands["grad_hy"] = grad_hy
    if grad_cy is not None:
        operands["grad_cy"] = grad_cy
    static = (grad_hy is not None, grad_cy is not None)
    _each("lstm_cell_backward", _lstm_backward, cx.sizes, operands, static)
    return gates, grad_cx, _bias_gradient(gates) if has_bias else None


@lowering("_thnn_fused_gru_cell")
def gru_cell(
    input_gates: Tensor, hidden_gates: Tensor, hx: Tensor, input_bias: Tensor | None, hidden_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(hy, workspace) of gates [B, 3 H], without the biases [3 H], and the state hx [B, H]."""
    _check_gates("_thnn_fused_gru_cell", 3, input_gates, hidden_gates, hx)
    hy, workspace = empty(hx.sizes, hx.dtype), empty((hx.sizes[0], hx.sizes[1] * 5), hx.dtype)
    operands = {
        "out_hy": hy,
        "out_workspace": workspace,
        "input_gates": input_gates,
        "hidden_gates": hidden_gates,
        "hx": hx,
    }
    _cell("gru_cell", _gru, hx, operands, input_bias, hidden_bias)
    return hy, workspace


@lowering("_thnn_fused_gru_cell_backward")
def gru_cell_backward(
    grad_hy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input's gates, the hidden state's gates, hx and both biases."""
    batch, hidden = grad_hy.sizes
    dtype = workspace.dtype
    of_input, of_hidden = empty((batch, hidden * 3), dtype), empty((batch, hidden * 3), dtype)
    grad_hx = empty((batch, hidden), dtype)
    operands = {"out_input_gates": of_input, "out_hidden_gates": of_hidden, "out_hx": grad_hx}
    operands |= {"workspace": workspace, "grad_hy": grad_hy}
    _each("gru_cell_backward", _gru_backward, (batch, hidden), operands)
    biases = (_bias_gradient(of_input), _bias_gradient(of_hidden)) if has_bias else (None, None)
    return of_input, of_hidden, grad_hx, *biases
