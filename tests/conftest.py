"""Fixtures for all tests. The CPU fallback is refused: an operator without a kernel fails its test."""

import os
import zlib

os.environ["SPIRAL_FALLBACK"] = "error"
os.environ["SPIRAL_AUTOLOAD"] = (
    "1"  # in processes of tests; a PyTorch built for CUDA does not load the device by itself
)

import pytest
import torch

import torch_spiral  # noqa: F401
from torch_spiral.testing.devices import compare_with_cpu, engines

compare_with_cpu()


# The index of the first device of each engine.
ENGINES = {name: device.index for name, device in engines().items()}


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="i/n: the i-th of n parts of the tests")


def pytest_report_header(config):
    lines = [
        f"spiral:{i}: {p.engine}, {p.name}" for i in ENGINES.values() for p in [torch.spiral.get_device_properties(i)]
    ]
    return [*lines, *(f"{r['engine']}: {r['why']}" for r in torch.spiral.engines() if r["why"])]


# `make test` runs what is not marked `full`. Kernels take a second each to compile on a software adapter: a fixed sixth of its tests
# are everyday ones, but for these files, which test what differs between engines or choose a part themselves.
ALWAYS_WHOLE = (
    "test_engine",
    "test_wgpu_engine",
    "test_memory",
    "test_stream_event",
    "test_device",
    "test_errors",
    "test_fallback",
    "test_ops",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    index, count = map(int, config.getoption("--shard").split("/"))
    items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % count == index]
    wgpu = ENGINES.get("wgpu")
    software = wgpu is not None and torch.spiral.get_device_properties(wgpu).type == "software"
    for item in items:
        thinned = software and item.path.stem not in ALWAYS_WHOLE
        slow = thinned and any(word in item.name for word in ("wgpu", "wgsl", "lavapipe"))
        if slow and zlib.crc32(item.nodeid.encode()) % 6:
            item.add_marker(pytest.mark.full)


@pytest.fixture(params=sorted(ENGINES) or ["none"])
def device(request):
    """A torch.device of each engine, made the current one: "spiral" means it too."""
    if request.param == "none":
        pytest.fail("no spiral device: `python -m torch_spiral` says why")
    index = ENGINES[request.param]
    with torch.spiral.device(index):
        yield torch.device("spiral", index)
        torch.spiral.synchronize(index)


@pytest.fixture
def clean_memory(device):
    """Nothing cached before, everything given back after."""
    import gc

    gc.collect()
    torch.spiral.empty_cache()
    yield
    gc.collect()
    torch.spiral.empty_cache()
