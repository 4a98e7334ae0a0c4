"""Products with quantized operands, against float64 on the CPU."""

import pytest
import torch

aten = torch.ops.aten
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.cpu().double() - want).norm() / want.norm()
    assert error <= TOLERANCE[got.dtype], error


@pytest.mark.parametrize("m,k,n", [(1, 16, 8), (20, 70, 33), (130, 64, 96), (3, 0, 5)])
def test_int_mm(device, m, k, n):
    a, b = torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(-128, 128, (n, k), dtype=torch.int8).t()
    got = torch._int_mm(a.to(device), b.to(device))
    assert got.dtype == torch.int32 and torch.equal(got.cpu().long(), a.long() @ b.long())


def test_int_mm_refuses(device):
    a = torch.zeros(4, 8, dtype=torch.int8, device=device)
    with pytest.raises(RuntimeError, match="needs to match"):
        torch._int_mm(a, a)
    with pytest.raises(RuntimeError, match="int8"):
        torch._int_mm(a.float(), a.t().float())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("m,k,n", [(1, 64, 40), (5, 100, 64), (300, 128, 72)])
def test_weights_of_8_bits(device, dtype, m, k, n):
    x, w = torch.randn(m, k).to(dtype), torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scales = (torch.rand(n) / 100).to(dtype)
    got = aten._weight_int8pack_mm(x.to(device), w.to(device), scales.to(device))
    assert got.dtype == dtype
    close(got, x.double() @ w.double().t() * scales.double())


@pytest.mark.parametrize(
    "dtype,group,inner", [(torch.float32, 32, 2), (torch.float16, 64, 4), (torch.bfloat16, 128, 8)]
)
@pytest.mark.parametrize("m", [1, 5, 40])
def test_weights_of_4_bits(device, dtype, group, inner, m):
    k, n = 256, 48
    x, q = torch.randn(m, k).to(dtype), torch.randint(0, 16, (n, k))
    scales = torch.stack([torch.rand(k // group, n) / 10, torch.randn(k // group, n)], -1).to(dtype)
    packed = (q[:, ::2] * 16 + q[:, 1::2]).to(torch.uint8)
    weight = aten._convert_weight_to_int4pack(packed.to(device), inner)
    assert weight.shape == (n // 8, k // (inner * 16), 32, inner // 2) and weight.dtype == torch.int32
    beside = torch.cat([x[:, :1], x], 1).to(device)[:, 1:]  # at no multiple of four elements
    got = aten._weight_int4pack_mm(beside, weight, group, scales.to(device))
    factor, zero = (scales[..., i].double().repeat_interleave(group, 0).t() for i in (0, 1))
    close(got, x.double() @ ((q - 8) * factor + zero).t())


def test_weights_of_4_bits_refuse(device):
    with pytest.raises(RuntimeError, match="multiple of 8"):
        aten._convert_weight_to_int4pack(torch.zeros(7, 64, dtype=torch.uint8, device=device), 2)
    weight = aten._convert_weight_to_int4pack(torch.zeros(8, 64, dtype=torch.uint8, device=device), 2)
    with pytest.raises(RuntimeError, match="qGroupSize"):
        aten._weight_int4pack_mm(torch.zeros(1, 128, device=device), weight, 48, torch.zeros(2, 8, 2, device=device))
    with pytest.raises(RuntimeError, match="groups"):
        aten._weight_int4pack_mm(torch.zeros(1, 128, device=device), weight, 32, torch.zeros(2, 8, 2, device=device))
