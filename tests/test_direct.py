"""Compiled functions on disk: which graphs are kept, what tells them apart, and that they are found without Inductor."""

import functools

import pytest
import torch
from torch._inductor import codecache, compile_fx, config

from torch_spiral.compiler import backend, direct


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.fixture
def kept(tmp_path):
    return lambda: sorted(p for p in (tmp_path / "spiral").rglob("*") if p.is_file())


def refuse(*args, **kwargs):
    raise AssertionError("compiled again")


def key_of(f, *args, **settings):
    """The key of f's one graph, and of another trace of it."""
    keys = []

    def note(gm, inputs):
        keys.append(direct.key(gm, inputs, settings))
        return gm.forward

    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(f, backend=note, fullgraph=True)(*args)
    assert len(keys) == 2 and keys[0] == keys[1]
    return keys[0]


def f(x, w):
    return (x @ w).relu().softmax(-1) * 1.5


def test_keys_tell_apart_what_is_compiled_differently(device):
    x, w = torch.randn(8, 8, device=device), torch.randn(8, 8, device=device)
    wide, flat = torch.randn(8, 16, device=device), torch.randn(80, device=device)
    key = functools.partial(key_of, f)
    with torch.no_grad():
        keys = {
            "plain": key(x, w),
            "rows": key(wide.t(), w),
            "transposed": key(x.t(), w),
            "sliced": key(wide[:, :8], w),
            "expanded": key(x[:1].expand(8, 8), w),
            "offset": key(flat[16:].view(8, 8), w),
            "dtype": key(x.half(), w.half()),
            "gradients": key(x, w.clone().requires_grad_()),
            "constant": key_of(lambda x, w: (x @ w).relu().softmax(-1) * 1.25, x, w),
            "order": key_of(lambda x, w: (w @ x).relu().softmax(-1) * 1.5, x, w),
            "empty": key(x[:0], w),
            "option": key(x, w, size_asserts=True),
        }
        with config.patch(split_reductions=False):
            keys["configuration"] = key(x, w)
        with torch.autocast("spiral", torch.float16):
            keys["autocast"] = key(x, w)
    keys["grad mode"] = key(x, w)
    torch.use_deterministic_algorithms(True)
    try:
        keys["deterministic"] = key(x, w)
    finally:
        torch.use_deterministic_algorithms(False)
    assert None not in keys.values() and len(set(keys.values())) == len(keys), keys


def test_graphs_whose_text_does_not_say_all_have_no_key(device):
    x, w = torch.randn(8, 8, device=device), torch.randn(8, 8, device=device)

    @torch.library.custom_op("spiral_direct::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)
    with torch.no_grad():
        assert key_of(lambda x: twice(x) + 1, x) is None
        with torch._dynamo.config.patch(assume_static_by_default=False):
            assert key_of(f, x, w) is None
        with config.patch(fx_graph_cache=False):
            assert key_of(f, x, w) is None
        with torch._functorch.config.patch(enable_autograd_cache=False):
            assert key_of(f, x, w) is None
        assert key_of(f, x, w, post_grad_custom_pre_pass=refuse) is None
        with config.patch(post_grad_custom_pre_pass=refuse):
            assert key_of(f, x, w) is None
        assert key_of(f, x, w) is not None


def test_a_kept_function_is_found_without_compiling(device, kept, monkeypatch):
    cpu = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    x, w = (t.float().to(device) for t in cpu)

    def run(*args):
        torch._dynamo.reset()
        with torch.no_grad():
            return torch.compile(f, backend="spiral", fullgraph=True)(*args).cpu()

    first = run(x, w)
    torch.testing.assert_close(first.double(), f(*cpu), rtol=1e-5, atol=1e-6)
    assert len(kept()) == 1
    with monkeypatch.context() as m:
        m.setattr(compile_fx, "compile_fx", refuse)
        assert torch.equal(run(x, w), first)
        other = torch.randn(8, 8)
        torch.testing.assert_close(run(other.to(device), w), f(other, w.cpu()), rtol=1e-5, atol=1e-6)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="compiled again"):
            run(x.t(), w)
    (file,) = kept()
    file.write_text(file.read_text().replace("graph_0", "graph_1"))  # damaged: made anew
    assert torch.equal(run(x, w), first)
    with monkeypatch.context() as m:
        m.setattr(compile_fx, "compile_fx", refuse)
        assert torch.equal(run(x, w), first)


def test_graphs_that_write_or_have_more_to_a_call_are_not_kept(device, kept):
    x, w = torch.randn(8, 8, device=device), torch.randn(8, 8, device=device)
    compile = functools.partial(torch.compile, backend=backend, fullgraph=True)
    with torch.no_grad():
        compile(lambda x, w: x.add_(w))(x, w)
        compile(lambda x, w: (x.view(64), x @ w))(x, w)  # a view of an input
    compile(f)(x, w.requires_grad_()).sum().backward()
    with torch.no_grad(), torch._dynamo.config.patch(assume_static_by_default=False):  # symbolic sizes
        compile(lambda x, w: (x @ w).exp())(x, w.detach())
    assert not kept()
    with torch.no_grad():
        compile(lambda x, w: (x @ w).sin())(x, w.detach())
    assert len(kept()) == 1


def test_a_damaged_module_of_inductors_is_written_again(device, tmp_path, recwarn):
    def g(x):
        return (x.sort()[0] + 1).relu()  # not kept by us: sizes are symbols

    def run(x):
        torch._dynamo.reset()
        codecache.PyCodeCache.modules_no_attr.clear()
        with torch.no_grad():
            got = torch.compile(g, backend="spiral", dynamic=True)(x.to(device))
        torch.testing.assert_close(got.cpu(), g(x))

    x = torch.randn(5, 8)
    run(x)
    (module,) = tmp_path.rglob("*.py")
    text = module.read_text()
    for again in (lambda: run(x), lambda: codecache.PyCodeCache.write(text)):  # found in a cache, and compiled anew
        for damage in (text[:100], "", text + "?"):
            module.write_text(damage)
            again()
            assert module.read_text() == text
    assert not [w for w in recwarn if "eagerly" in str(w.message)]
