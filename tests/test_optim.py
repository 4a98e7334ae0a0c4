"""Optimizers, gradient scaling and the _foreach_ ops against the CPU, and how many kernels they launch."""

import pytest
import torch

SHAPES = [(3, 5), (70,), (), (0,), (1, 17000)]


def tensors(seed, dtype=torch.float32, positive=False):
    g = torch.Generator().manual_seed(seed)
    out = [torch.randn(s, generator=g).to(dtype) for s in SHAPES]
    out.append(torch.randn(6, 4, generator=g).to(dtype).t())
    return [x.abs() + 0.5 for x in out] if positive else out


CASES = {
    "adamw": (torch.optim.AdamW, {}),
    "adam_amsgrad": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    "adamw_maximize": (torch.optim.AdamW, {"maximize": True, "lr": 0.01}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd_nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd_dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "maximize": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_steps(device, name, kind):
    make, options = CASES[name]
    reference = [x.double().requires_grad_() for x in tensors(0)]
    ours = [x.to(device).requires_grad_() for x in tensors(0)]
    a, b = make(reference, **options), make(ours, **options, **{kind: True})
    for step in range(3):
        for x, y, g in zip(reference, ours, tensors(step + 1)):
            x.grad, y.grad = g.double(), g.to(device)
        a.step()
        b.step()
    for x, y in zip(reference, ours):
        torch.testing.assert_close(y.detach().cpu().double(), x.detach(), rtol=3e-6, atol=3e-6)


def test_tensor_learning_rate_scale_and_infinity(device):
    def step(found, lr):
        p = [torch.ones(40, device=device), torch.ones(3, 4, device=device)]
        g = [torch.full_like(x, 4.0) for x in p]
        torch._fused_sgd_(
            p, g, [], weight_decay=0.0, momentum=0.0, lr=lr, dampening=0.0, nesterov=False, maximize=False, is_first_step=True,
            grad_scale=torch.tensor(2.0, device=device), found_inf=torch.tensor(found, device=device),
        )  # fmt: skip
        return p[1][0, 0].item(), g[0][0].item()

    assert step(0.0, 0.25) == (0.5, 2.0)
    assert step(0.0, torch.tensor(0.25)) == (0.5, 2.0)
    assert step(0.0, torch.tensor(0.25, device=device)) == (0.5, 2.0)
    assert step(1.0, 0.25) == (1.0, 4.0)


def test_gradient_scaling(device):
    for bad in (False, True):
        grads = [torch.ones(100, device=device), torch.ones(3, 70, device=device).t()]
        if bad:
            grads[1][5, 2] = float("inf")
        found = torch.zeros((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.full((), 0.5, device=device))
        assert found.item() == bad and grads[0][7].item() == 0.5 and grads[1][0, 0].item() == 0.5
        scale, tracker = torch.full((), 8.0, device=device), torch.zeros((), dtype=torch.int32, device=device)
        seen = []
        for _ in range(2):
            torch._amp_update_scale_(scale, tracker, found, 2.0, 0.5, 2)
            seen.append((scale.item(), tracker.item()))
        assert seen == ([(4.0, 0), (2.0, 0)] if bad else [(8.0, 1), (16.0, 0)])


UNARY = [
    "abs",
    "ceil",
    "cos",
    "erf",
    "exp",
    "floor",
    "log",
    "neg",
    "reciprocal",
    "round",
    "rsqrt",
    "sigmoid",
    "sign",
    "sqrt",
    "tanh",
    "trunc",
]


@pytest.mark.parametrize("op", UNARY)
def test_unary(device, op):
    xs = tensors(0, positive=True)
    for got, want in zip(
        getattr(torch, f"_foreach_{op}")([x.to(device) for x in xs]), getattr(torch, f"_foreach_{op}")(xs)
    ):
        torch.testing.assert_close(got.cpu(), want, rtol=2e-6, atol=2e-6)
    ours = [x.to(device) for x in xs]
    getattr(torch, f"_foreach_{op}_")(ours)
    for got, want in zip(ours, getattr(torch, f"_foreach_{op}")(xs)):
        torch.testing.assert_close(got.cpu(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "maximum", "minimum", "clamp_min", "clamp_max", "pow"])
def test_binary(device, op):
    xs, ys = tensors(0, positive=True), tensors(1, positive=True)
    numbers = [float(i) - 1.5 for i in range(len(xs))]
    f, f_ = getattr(torch, f"_foreach_{op}"), getattr(torch, f"_foreach_{op}_")
    for second in (1.5, 2, ys, numbers):
        other = [y.to(device) for y in ys] if second is ys else second
        ours = [x.to(device) for x in xs]
        wants = f(xs, second)
        for got, want in zip(f(ours, other), wants):
            torch.testing.assert_close(got.cpu(), want, rtol=2e-5, atol=2e-6)
        f_(ours, other)
        for got, want in zip(ours, wants):
            torch.testing.assert_close(got.cpu(), want, rtol=2e-5, atol=2e-6)


def test_ternary_and_one_tensor(device):
    a, b, c = tensors(0), tensors(1), tensors(2, positive=True)
    da, db, dc = ([x.to(device) for x in xs] for xs in (a, b, c))
    numbers = [0.1 * i for i in range(len(a))]
    calls = [
        lambda a, b, c: torch._foreach_addcmul(a, b, c, 0.5),
        lambda a, b, c: torch._foreach_addcdiv(a, b, c, numbers),
        lambda a, b, c: torch._foreach_addcdiv(a, b, c, torch.tensor(numbers)),
        lambda a, b, c: torch._foreach_lerp(a, b, 0.3),
        lambda a, b, c: torch._foreach_lerp(a, b, c),
        lambda a, b, c: torch._foreach_add(a, b, alpha=2),
        lambda a, b, c: torch._foreach_mul(a, c[2]),
        lambda a, b, c: torch._foreach_pow(2.0, a),
    ]
    for call in calls:
        for got, want in zip(call(da, db, dc), call(a, b, c)):
            torch.testing.assert_close(got.cpu(), want, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.uint8])
def test_dtypes(device, dtype):
    xs = [torch.arange(7).to(dtype), torch.arange(40).to(dtype)]
    ours = [x.to(device) for x in xs]
    for call in (
        lambda x: torch._foreach_add(x, 2), lambda x: torch._foreach_mul(x, 1.5), lambda x: torch._foreach_div(x, 2),
        lambda x: torch._foreach_sqrt(x), lambda x: torch._foreach_add(x, x), lambda x: torch._foreach_maximum(x, 3),
    ):  # fmt: skip
        for got, want in zip(call(ours), call(xs)):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got.cpu(), want)


def test_broadcast_copies_and_zero(device):
    a, b = [torch.randn(2, 3), torch.randn(4)], [torch.randn(3), torch.randn(1)]
    for got, want in zip(
        torch._foreach_mul([x.to(device) for x in a], [x.to(device) for x in b]), torch._foreach_mul(a, b)
    ):
        torch.testing.assert_close(got.cpu(), want)
    ours = [torch.zeros(2, 3, device=device), torch.zeros(4, device=device, dtype=torch.float16)]
    torch._foreach_copy_(ours, a)
    torch._foreach_copy_(ours, [x.to(device) for x in a])
    assert torch.equal(ours[0].cpu(), a[0]) and torch.equal(ours[1].cpu(), a[1].half())
    torch._foreach_zero_(ours)
    assert not ours[0].any() and not ours[1].any()


def test_errors(device):
    x = [torch.ones(3, device=device)]
    with pytest.raises(RuntimeError, match="same number of tensors"):
        torch._foreach_add(x, x + x)
    with pytest.raises(RuntimeError, match="can't be cast"):
        torch._foreach_add_([torch.ones(3, device=device, dtype=torch.int32)], 1.5)


def test_contiguous_lists_are_not_copied(device):
    """Tensors of one shape stay as they are, whatever dimensions of size 1 they have."""
    shapes = [(8, 3, 7, 7), (8, 8, 1, 1), (5, 8), (8,), (1, 4, 1)]
    a = [torch.ones(s, device=device) for s in shapes]
    b = [torch.full(s, 2.0, device=device) for s in shapes]

    def step():
        torch._foreach_lerp_(a, b, 0.5)
        torch._foreach_addcmul_(a, b, b, 0.5)
        return torch._foreach_sqrt(a)

    step()
    with torch.spiral.telemetry() as t:
        roots = step()
    assert not [k.kernel for k in t.kernels() if k.kernel.startswith("copy")]
    assert all(r.is_contiguous() for r in roots)


def test_lists_may_hold_numbers_of_the_cpu(device):
    """As a learning rate that is a tensor; other tensors of the CPU do not mix."""
    a = [torch.ones(3, device=device), torch.ones(2, 2, device=device)]
    scaled = torch._foreach_mul(a, [torch.tensor(2.0), torch.tensor(3.0)])
    assert [t.tolist() for t in scaled] == [[2, 2, 2], [[3, 3], [3, 3]]]
    with pytest.raises(RuntimeError, match="same device"):
        torch._foreach_add(a, [torch.ones(3), torch.ones(2, 2)])
