"""Ahead-of-time packages: written from torch.export, loaded by a process that never imports Inductor."""

import json
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export

from torch_spiral.compiler import PackageError, load, package


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Model(nn.Module):
    """A product with an epilogue, a norm, a convolution, attention, an operator that is not fused, and a counter."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, *, shift):
        self.calls.add_(1)
        y = self.bn(self.conv(x)).relu().flatten(2).transpose(1, 2)
        q, k, v = (z.unsqueeze(1) for z in self.qkv(self.norm(y)).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return {"logits": F.gelu(self.out(z)) + shift, "order": z.sum(-1).sort(-1).values, "calls": self.calls + 0}


def make(device, path):
    model = Model().eval()
    x, shift = torch.randn(2, 3, 6, 6), torch.randn(5)
    with torch.no_grad():
        expected = model(x, shift=shift)
        model.calls.zero_()
        exported = export(model.to(device), (x.to(device),), {"shift": shift.to(device)})
    package(exported, path)
    torch.save({"x": x, "shift": shift, "expected": expected}, path.with_name("data.pt"))
    return x, shift, expected


@pytest.mark.parametrize("name", ["model", pytest.param("model.zip", marks=pytest.mark.full)])
def test_a_package_runs_without_inductor(device, tmp_path, name):
    """In a process of its own, which has no module of Inductor after loading and running."""
    make(device, tmp_path / name)
    code = f"""
        import sys
        import torch
        from torch_spiral.compiler import load
        torch.backends.cudnn.allow_tf32 = False
        model = load({str(tmp_path / name)!r}, {str(device)!r})
        d = torch.load({str(tmp_path / "data.pt")!r})
        x, shift = d["x"].to({str(device)!r}), d["shift"].to({str(device)!r})
        for call in range(1, 4):
            got = model(x, shift=shift)
            assert got["calls"].item() == call, got["calls"]
            for name in ("logits", "order"):
                torch.testing.assert_close(got[name].cpu(), d["expected"][name], rtol=1e-4, atol=1e-5)
        found = [m for m in sys.modules if m.startswith("torch._inductor")]
        assert not found, found
        assert model.constants["calls"].item() == 3
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_dynamic_sizes(device, tmp_path):
    m = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8)).eval()
    x = torch.randn(4, 16)
    with torch.no_grad():
        expected = {n: m(torch.arange(16.0 * n).view(n, 16).sin()) for n in (2, 7, 32)}
        exported = export(m.to(device), (x.to(device),), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))
        package(exported, tmp_path / "m")
        loaded = load(tmp_path / "m", device)
        for n, y in expected.items():
            torch.testing.assert_close(
                loaded(torch.arange(16.0 * n).view(n, 16).sin().to(device)).cpu(), y, rtol=1e-4, atol=1e-5
            )


def test_written_inputs_and_shared_constants(device, tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, i, seen):
            seen.add_(1)
            return self.head(self.embedding(i))

    m, i = Tied().eval(), torch.tensor([1, 5, 2])
    with torch.no_grad():
        expected = m(i, torch.zeros(3))
        exported = export(m.to(device), (i.to(device), torch.zeros(3, device=device)))
    package(exported, tmp_path / "m.zip")
    loaded, seen = load(tmp_path / "m.zip", device), torch.zeros(3, device=device)
    for n in (1, 2):
        torch.testing.assert_close(loaded(i.to(device), seen).cpu(), expected, rtol=1e-4, atol=1e-5)
        assert seen.tolist() == [n] * 3
    with zipfile.ZipFile(tmp_path / "m.zip") as z:
        assert z.getinfo("constants.bin").file_size < 2 * 4 * 80


def test_sizes_and_strides_of_a_call(device, tmp_path):
    """What the program was not exported for is refused, or copied to the strides it was exported for."""

    class Scaled(nn.Module):
        def forward(self, x, w):
            return x * w + 1

    x, w = torch.randn(4, 8), torch.randn(8)
    batch = torch.export.Dim("batch", min=2, max=16)
    package(
        torch.export.export(Scaled(), (x.to(device), w.to(device)), dynamic_shapes=({0: batch}, None)), tmp_path / "m"
    )
    model = load(tmp_path / "m", device)
    strided = torch.randn(8, 6).t()
    torch.testing.assert_close(model(strided.to(device), w.to(device)).cpu(), strided * w + 1)
    for wrong in (torch.randn(4, 9), torch.randn(8), torch.randn(4, 8).half(), torch.randn(17, 8), torch.randn(1, 8)):
        with pytest.raises(ValueError, match="this package was exported for a tensor of float32 and sizes"):
            model(wrong.to(device), w.to(device))


@pytest.mark.full
def test_what_is_wrong_with_a_call_is_said(device, tmp_path):
    make(device, tmp_path / "m")
    model = load(tmp_path / "m", device)
    x, shift = torch.randn(2, 3, 6, 6), torch.randn(5)
    with pytest.raises(ValueError, match=r'move it with .to\("spiral"\)'):
        model(x, shift=shift)
    with pytest.raises(TypeError, match="takes arguments structured as"):
        model(x.to(device))


def test_damaged_packages_are_refused(device, tmp_path):
    make(device, tmp_path / "m")
    files = sorted(p for p in (tmp_path / "m").rglob("*") if p.is_file())
    assert {"manifest.json", "program.json", "constants.bin"} < {p.name for p in files}
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        with pytest.raises(PackageError, match="damaged"):
            load(tmp_path / "m", device)
        path.unlink()
        with pytest.raises((PackageError, FileNotFoundError)):
            load(tmp_path / "m", device)
        path.write_bytes(data)
    (tmp_path / "m" / "more.txt").write_text("")
    with pytest.raises(PackageError, match=r"more\.txt does not belong"):
        load(tmp_path / "m", device)
    (tmp_path / "m" / "more.txt").unlink()
    load(tmp_path / "m", device)
    (tmp_path / "x.zip").write_bytes(b"PK no")
    with pytest.raises(PackageError, match="no package"):
        load(tmp_path / "x.zip", device)


@pytest.mark.full
def test_a_package_of_another_device_is_refused(device, tmp_path):
    make(device, tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    from torch_spiral.compiler.package import _digest

    manifest.pop("digest")
    manifest["target"] = manifest["target"].replace("language='", "language='un")
    manifest["digest"] = _digest(manifest)
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match="was compiled for"):
        load(tmp_path / "m", device)


def test_programs_on_the_cpu_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r'export model.to\("spiral"\)'):
        package(export(nn.Linear(2, 2), (torch.randn(1, 2),)), tmp_path / "m")
