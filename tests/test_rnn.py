"""LSTM and GRU against float64 on the CPU: layers, cells, packed sequences, gradients of everything."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

LAYERS = {
    "plain": {},
    "deep": {"bidirectional": True, "num_layers": 2},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "packed": {"batch_first": True, "bidirectional": True},
    "projected": {"proj_size": 6},
}


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert got.shape == want.shape
    error = (got.detach().cpu().double() - want.detach().double()).norm() / want.norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.1e}"


def run(layer: nn.Module, x: torch.Tensor, lengths: torch.Tensor | None, weight: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, final states, gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    result, states = layer(x if lengths is None else pack_padded_sequence(x, lengths, batch_first=layer.batch_first))
    result = result if lengths is None else result.data
    states = states if isinstance(states, tuple) else (states,)
    loss = (result * result).sum() + sum((s * weight[: s.numel()].view(s.shape)).sum() for s in states)
    loss.backward()
    return [result, *states, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_layer(device, kind, options):
    if options == "projected" and kind == "GRU":
        pytest.skip("only LSTMs project")
    torch.manual_seed(0)
    kwargs = LAYERS[options]
    layer = getattr(nn, kind)(10, 19, **kwargs)
    x = torch.randn((4, 5, 10) if kwargs.get("batch_first") else (5, 4, 10))
    lengths = torch.tensor([5, 4, 2, 2]) if options == "packed" else None
    weight = torch.randn(1000)
    want = run(copy.deepcopy(layer).double(), x.double(), lengths, weight.double())
    got = run(layer.to(device), x.to(device), lengths, weight.to(device))
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
@pytest.mark.parametrize("hidden", [1, 33])
def test_cell(device, kind, hidden):
    torch.manual_seed(1)
    cell = getattr(nn, kind)(7, hidden)
    x = torch.randn(3, 7)
    results = []
    for c, on, dtype in (
        (copy.deepcopy(cell).double(), "cpu", torch.float64),
        (cell.to(device), device, torch.float32),
    ):
        state = None
        for _ in range(3):
            state = c(x.to(on, dtype), state)
        states = state if isinstance(state, tuple) else (state,)
        states[0].square().sum().backward()  # no gradient for the cell state of an LSTM
        results.append([*states, *(p.grad for p in c.parameters())])
    for a, b in zip(*reversed(results), strict=True):
        close(a, b)


def test_float16(device):
    torch.manual_seed(2)
    cell = nn.GRUCell(8, 16).half()
    x, h = torch.randn(4, 8).half(), torch.randn(4, 16).half()
    close(cell.to(device)(x.to(device), h.to(device)), cell.cpu().double()(x.double(), h.double()), 2e-3)


def test_nan_reaches_the_state(device):
    cell = nn.LSTMCell(2, 3).to(device)
    x = torch.tensor([[0.0, torch.nan], [0.0, 1.0]], device=device)
    h, c = (s.cpu() for s in cell(x))
    assert h[0].isnan().all() and c[0].isnan().all() and not h[1].isnan().any()


def test_gates_that_do_not_fit(device):
    gates, state = torch.zeros(2, 12, device=device), torch.zeros(2, 4, device=device)
    with pytest.raises(RuntimeError, match="expected 16 columns"):
        torch.ops.aten._thnn_fused_lstm_cell(gates, gates, state)
    assert torch.ops.aten._thnn_fused_gru_cell(gates, gates, state)[0].shape == (2, 4)
