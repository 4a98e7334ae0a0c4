"""The samples of op_db under torch.compile(backend="spiral") against eager on the CPU, in float32.

A quick selection by default; `pytest -m full` runs every operator. SPIRAL_COMPILE_SAMPLES says how many samples an operator gets."""

import os

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map_only

SAMPLES = int(os.environ.get("SPIRAL_COMPILE_SAMPLES", "2"))
# Results that no two runs share: uninitialised memory and random numbers.
UNDETERMINED = (
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "bernoulli", "cauchy", "exponential",
    "geometric", "log_normal", "multinomial", "normal", "rand_like", "randint", "randint_like", "randn", "randn_like", "uniform",
    "nn.functional.alpha_dropout", "nn.functional.dropout", "nn.functional.dropout2d", "nn.functional.dropout3d",
    "nn.functional.feature_alpha_dropout", "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d",
    "nn.functional.rrelu", "nn.functional.multi_head_attention_forward", "pca_lowrank", "svd_lowrank",
)  # fmt: skip
# CUDA's own.
ELSEWHERE = (
    "jiterator_2inputs_2outputs", "jiterator_4inputs_with_extra_args", "jiterator_binary", "jiterator_binary_return_by_ref", "jiterator_unary",
)  # fmt: skip
# Whose tensor of indices must be on the CPU, on every device.
INDICES_ON_CPU = ("tensor_split",)
OPS = [op for op in op_db if torch.float32 in op.dtypes and op.name not in (*UNDETERMINED, *ELSEWHERE)]
# Relative errors of operators that amplify rounding; eager spiral's are the same.
TOLERANCES = {"matrix_exp": 5e-3}
# Under torch.compile the mean of nothing is 0 on every device.
NOT_EMPTY = ("std_mean", "var_mean")
pytestmark = pytest.mark.filterwarnings("error:spiral runs a graph")  # a graph that is run eagerly is a failure here
QUICK = (
    "add", "addmm", "argmax", "baddbmm", "bmm", "cat", "clamp", "cumsum", "div", "expand", "flip", "gather", "index_select", "linspace",
    "logsumexp", "masked_fill", "matmul", "max", "mean", "nn.functional.conv2d", "nn.functional.embedding", "nn.functional.gelu",
    "nn.functional.interpolate", "nn.functional.layer_norm", "nn.functional.pad", "permute", "pow", "roll", "scatter_add", "softmax", "sort",
    "std", "tril", "var_mean", "where",
)  # fmt: skip


def run(op, device):
    samples = list(op.sample_inputs("cpu", torch.float32, requires_grad=False))
    samples = [s for s in samples if op.name not in NOT_EMPTY or s.input.numel()]
    step = max(len(samples) // SAMPLES, 1)
    for sample in samples[::step][:SAMPLES]:
        args = (sample.input, *sample.args)

        def function(*args, kwargs=sample.kwargs):
            return op(*args, **kwargs)

        expected = function(
            *tree_map_only(torch.Tensor, torch.clone, args),
            kwargs=tree_map_only(torch.Tensor, torch.clone, sample.kwargs),
        )
        there, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(device), (args, sample.kwargs))
        if op.name in INDICES_ON_CPU:
            there = (there[0], *args[1:])
        torch._dynamo.reset()
        got = torch.compile(function, backend="spiral", dynamic=False)(*there, kwargs=move_devices(kwargs, device))
        for a, b in zip(tree_leaves(expected), tree_leaves(got), strict=True):
            if isinstance(a, torch.Tensor):
                assert a.dtype == b.dtype and a.shape == b.shape and a.layout == b.layout
                torch.testing.assert_close(b.cpu(), a, rtol=TOLERANCES.get(op.name, 1e-3), atol=1e-4, equal_nan=True)


def move_devices(kwargs, device):
    return {k: device if k == "device" else v for k, v in kwargs.items()}


@pytest.mark.parametrize(
    "op", [o for o in OPS if o.name in QUICK and not o.variant_test_name], ids=lambda op: op.formatted_name
)
def test_sample(op, opencl_device):
    run(op, opencl_device)


@pytest.mark.full
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.formatted_name)
def test_every_operator(op, opencl_device):
    run(op, opencl_device)


@pytest.fixture
def opencl_device():
    from conftest import ENGINES

    index = ENGINES.get("opencl", next(iter(ENGINES.values()), 0))
    with torch.spiral.device(index):
        yield torch.device("spiral", index)
