"""What csrc/aten/generate.py writes, and that what it wrote hands a lowering the arguments that it should."""

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from torch_spiral import _C, lowering

ROOT = Path(__file__).resolve().parent.parent
REGISTRATION = re.compile(r'm\.impl\(\s*"(?:aten::)?([^"]+)"')


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("spiral_generate", ROOT / "csrc" / "aten" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def yaml(generate):
    return generate.Yaml.load()


@pytest.fixture(scope="module")
def files(generate, yaml):
    return {**generate.native_files(yaml)[0], **generate.structured_files(yaml)[0]}


def test_counts(generate, yaml, files):
    assert sum(len(REGISTRATION.findall(text)) for text in files.values()) >= 770
    _, iterators, tensors = generate.stub_files(generate.scan_stubs())
    assert iterators >= 200
    assert tensors == len(generate.TENSOR_STUBS)


def test_no_overload_is_registered_twice(files):
    by_hand = []
    for path in (ROOT / "csrc").rglob("*.cpp"):
        text = path.read_text()
        for block in re.findall(r"TORCH_LIBRARY_IMPL\(aten, PrivateUse1, m\) \{(.*?)\n\}", text, re.S):
            by_hand += REGISTRATION.findall(block)
    generated = [name for text in files.values() for name in REGISTRATION.findall(text)]
    assert by_hand and generated
    assert [name for name, n in Counter(by_hand + generated).items() if n > 1] == []


def test_every_dense_overload_is_accounted_for(generate, yaml, files):
    """A kernel of both CPU and CUDA is registered, listed as remaining, or left out for a stated reason."""
    from torchgen.model import DispatchKey

    registered = {name for text in files.values() for name in REGISTRATION.findall(text)}
    remaining = {str(f.func.name) for f in yaml.remaining()}
    assert not registered & remaining
    lost = []
    for f in yaml.functions:
        name = str(f.func.name)
        if not (yaml.kernel(DispatchKey.CPU, f) and yaml.kernel(DispatchKey.CUDA, f)):
            continue
        if name in registered | remaining | set(generate.SKIP) or generate.FOREIGN.match(name):
            continue
        if str(f.func.name.name) not in generate.SKIP_STRUCTURED:
            lost.append(name)
    assert lost == []


def test_tables_name_what_exists(generate, yaml):
    overloads = {str(f.func.name) for f in yaml.functions}
    assert set(generate.SKIP) <= overloads
    structured = {generate.lowering_name(g) for g in yaml.structured}
    for table in (generate.SLOTS, generate.DROP, generate.PRECHECKS):
        assert set(table) <= structured
    stubs = {s.name for s in generate.scan_stubs()}
    assert set(generate.TENSOR_STUBS) | set(generate.ITERATOR_OUTS) <= stubs


def test_an_unchanged_file_is_not_rewritten(generate, tmp_path):
    path = tmp_path / "a.cpp"
    assert generate.write(path, "x")
    assert not generate.write(path, "x")
    assert generate.write(path, "y")


class Seen(Exception):
    """Raised by a lowering that only looks at its arguments, so that no plan is kept."""


@pytest.fixture
def seen(monkeypatch):
    """seen(name, call) runs call() and returns the arguments that the lowering `name` got."""

    def look(name, call):
        arguments = []

        def spy(*args):
            arguments.append(args)
            raise Seen

        _C.clear_plans()
        monkeypatch.setitem(lowering.lowerings, name, spy)
        with pytest.raises((Seen, RuntimeError)):
            call()
        assert arguments, f"{name} was not called"
        return arguments[0]

    yield look
    _C.clear_plans()


def kinds(arguments):
    names = {lowering.Tensor: "tensor", lowering.Iter: "iter", list: "list", tuple: "list", type(None): "none"}
    return [names.get(type(a), "slot" if isinstance(a, lowering.Sym) else a) for a in arguments]


def empty(*sizes, dtype=torch.float32):
    return torch.empty(sizes, dtype=dtype, device="spiral")


def test_structured_arguments(device, seen):
    a = empty(4, 4)
    addmm = kinds(seen("addmm", lambda: torch.addmm(a, a, a, beta=2, alpha=3)))
    assert addmm == ["tensor", "tensor", "tensor", "slot", "slot", "tensor"]
    assert kinds(seen("_softmax", lambda: a.softmax(-1))) == ["tensor", 1, False, "tensor"]
    assert kinds(seen("topk", lambda: a.topk(2, 0))) == ["tensor", "slot", 0, True, True, "tensor", "tensor"]
    tensors, dim, valid, out = seen("cat", lambda: torch.cat([a, a], -1))
    assert (len(tensors), dim, valid, out.ndim) == (2, 1, 0, 2)
    it, approximate = seen("gelu", lambda: torch.nn.functional.gelu(a, approximate="tanh"))
    assert (len(it.inputs), len(it.outputs), approximate) == (1, 1, "tanh")


def test_sizes_are_slots(device, seen):
    a = empty(1, 1, 4, 4)
    resized = seen("upsample_nearest2d", lambda: torch.nn.functional.interpolate(a, size=(7, 9)))
    assert all(isinstance(s, lowering.Sym) for s in resized[1])
    padded = seen("reflection_pad1d", lambda: torch.nn.functional.pad(a[0, 0], (1, 2), mode="reflect"))
    assert all(isinstance(s, lowering.Sym) for s in padded[1])


def test_iterator_stub_arguments(device, seen):
    a = empty(4, 6)
    it, alpha = seen("add_stub", lambda: torch.add(a.t(), torch.tensor(2.5), alpha=3))
    assert [o.is_scalar for o in it.inputs] == [False, True]
    assert it.ndim == 1 and isinstance(alpha, lowering.Sym)
    it, dim_size, strides = seen("index_stub", lambda: a[empty(3, dtype=torch.long), 1:])
    assert len(dim_size) == len(strides) == 1
    # what put_ writes is no operand of its iterator
    index = empty(3, dtype=torch.long)
    it, accumulate, written = seen("put_stub", lambda: a.put_(index, empty(3)))
    assert accumulate is False and isinstance(written, lowering.Tensor)


def test_tensor_stub_arguments(device, seen):
    a = empty(4, 6)
    values = kinds(seen("sort_stub", lambda: a.sort(0, descending=True)))
    assert values == ["tensor", 0, True, False, "tensor", "tensor"]
    assert kinds(seen("cumsum_stub", lambda: a.cumsum(1))) == ["tensor", 1, "tensor"]
    assert kinds(seen("normal_stub", lambda: a.normal_(1.0, 2.0))) == ["slot", "slot", "tensor"]
    assert kinds(seen("GroupNormKernel", lambda: torch.nn.functional.group_norm(a, 2))) == [
        "tensor", "none", "none", *["slot"] * 5, *["tensor"] * 3,
    ]  # fmt: skip


def test_upstream_checks_of_dtypes(device):
    a = empty(4, 4)
    with pytest.raises(RuntimeError, match="to have the same dtype"):
        torch.mm(a, empty(4, 4, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="supported for Half and BFloat16"):
        torch._softmax(a, 1, True)


def test_empty_results_run_no_lowering(device):
    a = empty(0, 4)
    assert torch.mm(a, empty(4, 3)).shape == (0, 3)
    assert a.sin().shape == (0, 4)


def test_out_is_resized_and_checked_by_aten(device):
    a = empty(0, 4)
    out = empty(0)
    torch.mm(a, empty(4, 3), out=out)
    assert out.shape == (0, 3)
    with pytest.raises(RuntimeError, match=r"same device|found at least two devices"):
        torch.mm(a, torch.empty(4, 3))


def test_everything_registered_has_a_lowering(generate, files):
    """So nothing that ATen hands to a stub or a structured body ends in an error where the fallback could run."""
    text = "".join(generate.stub_files(generate.scan_stubs())[0].values())
    stubs = set(re.findall(r"SPIRAL_(?:ITERATOR|TENSOR)_STUB\((\w+)", text))
    structured = set(re.findall(r'op_id\("(\w+)"\)', "".join(files.values())))
    assert len(stubs) > 240 and len(structured) > 60
    assert sorted(n for n in stubs | structured if n not in lowering.lowerings) == []
