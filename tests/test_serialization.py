"""Saving, loading, pickling and deep copies; also on a machine without the device."""

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("weights_only", [True, False])
def test_round_trip(device, weights_only):
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        x = torch.arange(12).view(3, 4).to(dtype)
        y = torch.load(saved(x.to(device)), weights_only=weights_only)
        assert y.device == device and torch.equal(y.cpu(), x)


def test_map_location(device):
    x = torch.arange(6.0)
    on_device = saved(x.to(device))
    for location in ("cpu", torch.device("cpu"), lambda storage, place: storage, {str(device): "cpu"}):
        on_device.seek(0)
        y = torch.load(on_device, map_location=location)
        assert y.device.type == "cpu" and torch.equal(y, x)
    for location in ("spiral", str(device), device, "spiral:0"):
        y = torch.load(saved(x), map_location=location)
        assert y.device.type == "spiral" and torch.equal(y.cpu(), x)
        assert y.device.index == (0 if location == "spiral:0" else device.index)
    with pytest.raises(RuntimeError, match="spiral"):
        torch.load(saved(x), map_location=f"spiral:{torch.spiral.device_count()}")


def test_shared_storage_stays_shared(device):
    x = torch.arange(10.0).to(device)
    a, b = torch.load(saved([x[2:5], x]))
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert a.storage_offset() == 2 and a.cpu().tolist() == [2, 3, 4]


def test_strides(device):
    x = torch.arange(12.0).view(3, 4).to(device).t()
    y = torch.load(saved(x))
    assert y.stride() == (1, 4) and torch.equal(y.cpu(), x.cpu())


def test_module_and_optimizer_state(device):
    model = torch.nn.Linear(3, 2)
    state = torch.load(saved(copy.deepcopy(model).to(device).state_dict()))
    assert all(v.device == device for v in state.values())
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(state)
    assert torch.equal(other.weight, model.weight)


def test_pickle(device):
    x = torch.arange(5.0).to(device)
    y = pickle.loads(pickle.dumps(x))
    assert y.device == device and torch.equal(y.cpu(), x.cpu())
    parameter = torch.nn.Parameter(x)
    y = pickle.loads(pickle.dumps(parameter))
    assert isinstance(y, torch.nn.Parameter) and y.device == device and y.requires_grad


def test_deepcopy(device):
    x = torch.arange(5.0).to(device)
    y = copy.deepcopy(x)
    x.copy_(torch.zeros(5))
    assert y.device == device and y.cpu().tolist() == [0, 1, 2, 3, 4]
    tied = torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2).to(device)
    again = copy.deepcopy(tied)
    assert again[0].weight is again[1].weight and again[0].weight is not tied[0].weight


def test_storage_to_the_cpu(device):
    storage = torch.arange(4.0).to(device).untyped_storage()
    assert storage.device == device
    assert storage.cpu().tolist() == torch.arange(4.0).untyped_storage().tolist()
    assert torch.arange(4.0).untyped_storage().to(device=str(device)).device == device


def test_without_the_device(device, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.arange(3.0).to(device), "tag": "kept"}, path)
    code = (
        "import sys, torch; assert not hasattr(torch, 'spiral');"
        f"d = torch.load({str(path)!r}, map_location='cpu'); print(d['w'].tolist(), d['tag'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})  # fmt: skip
    assert done.stdout.strip() == "[0.0, 1.0, 2.0] kept", done.stderr


def test_with_the_package_and_no_device(device, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(torch.arange(3.0).to(device), path)
    code = (
        f"import torch; print(torch.load({str(path)!r}, map_location='cpu').tolist())\n"
        f"try: torch.load({str(path)!r})\n"
        "except RuntimeError as e: print('map_location' in str(e))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "SPIRAL_ENGINE": "nonsense"})  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["[0.0, 1.0, 2.0]", "True"], done.stdout + done.stderr


def test_processes_refuse_to_share(device):
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing

    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        ForkingPickler.dumps(torch.ones(3).to(device))
