"""The caching allocator: reuse, statistics, peaks, budget, running out, and addresses."""

import itertools
import os
import random
import subprocess
import sys
import threading

import pytest
import torch

from torch_spiral import _C
from torch_spiral.testing.devices import engines

MiB = 1 << 20


def empty(device, size, dtype=torch.uint8):
    return torch.empty(size, dtype=dtype, device=device)


@pytest.fixture
def budget(device, clean_memory):
    before = torch.spiral.get_memory_budget()
    yield
    torch.spiral.set_memory_budget(before)


def test_statistics_follow_tensors(device, clean_memory):
    start = torch.spiral.memory_allocated()
    torch.spiral.reset_peak_memory_stats()
    x = empty(device, 3 * MiB)
    y = empty(device, 1000)
    assert torch.spiral.memory_allocated() == start + 3 * MiB + 1024
    assert torch.spiral.memory_reserved() >= 22 * MiB
    del x
    assert torch.spiral.memory_allocated() == start + 1024
    assert torch.spiral.max_memory_allocated() == start + 3 * MiB + 1024
    torch.spiral.reset_peak_memory_stats()
    assert torch.spiral.max_memory_allocated() == start + 1024
    stats = torch.spiral.memory_stats()
    assert stats["allocated_bytes.all.current"] == start + 1024
    assert stats["allocation.large_pool.current"] == 0 and stats["allocation.large_pool.allocated"] >= 1
    torch.spiral.reset_accumulated_memory_stats()
    assert torch.spiral.memory_stats()["allocation.all.allocated"] == 0
    del y


def test_accelerator_sees_the_same(device, clean_memory):
    x = empty(device, 5 * MiB)
    assert torch.accelerator.memory_allocated() == torch.spiral.memory_allocated() >= 5 * MiB
    assert torch.accelerator.memory_reserved() == torch.spiral.memory_reserved()
    free, total = torch.accelerator.get_memory_info()
    assert (free, total) == torch.spiral.mem_get_info() and 0 < free <= total
    del x
    torch.accelerator.empty_cache()
    assert torch.accelerator.memory_reserved() == torch.spiral.memory_reserved()


def test_summary_names_the_numbers(device):
    x = empty(device, 123 * MiB)
    summary = torch.spiral.memory_summary()
    assert "Reserved memory" in summary and torch.spiral.get_device_name(device) in summary and "MiB" in summary
    assert len(torch.spiral.memory_summary(abbreviated=True)) < len(summary)
    del x


def test_freed_memory_is_reused(device, clean_memory):
    for size in (1, 512, 4000, MiB, 3 * MiB, 30 * MiB):
        x = empty(device, size)
        address, reserved = x.data_ptr(), torch.spiral.memory_reserved()
        del x
        x = empty(device, size)
        assert x.data_ptr() == address and torch.spiral.memory_reserved() == reserved
        del x


def test_empty_cache_gives_everything_back(device, clean_memory):
    start = torch.spiral.memory_reserved()
    tensors = [empty(device, size) for size in (1, 100000, 2 * MiB, 15 * MiB, 40 * MiB)]
    assert torch.spiral.memory_reserved() > start
    tensors.clear()
    torch.spiral.empty_cache()
    assert torch.spiral.memory_reserved() == start
    stats = torch.spiral.memory_stats()
    assert stats["inactive_split.all.current"] == 0 or start > 0


def test_random_sizes_never_overlap_and_leave_nothing(device, clean_memory):
    start = torch.spiral.memory_allocated(), torch.spiral.memory_reserved()
    rng = random.Random(1)
    live: dict[int, torch.Tensor] = {}
    for step in range(3000):
        if live and rng.random() < 0.5:
            live.pop(rng.choice(list(live)))
        else:
            live[step] = empty(device, int(2 ** rng.uniform(0, 22)))
        if step % 300 == 0:
            ranges = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t in live.values())
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
            held = sum((t.numel() + 511) // 512 * 512 for t in live.values())
            assert held <= torch.spiral.memory_allocated() - start[0] <= held + len(live) * MiB
    live.clear()
    torch.spiral.empty_cache()
    assert (torch.spiral.memory_allocated(), torch.spiral.memory_reserved()) == start
    if start == (0, 0):
        stats = torch.spiral.memory_stats()
        assert all(value == 0 for key, value in stats.items() if key.endswith(".current"))


def test_neighbours_keep_their_contents(device):
    rng = random.Random(2)
    held = []
    for value in range(200):
        x = torch.full((rng.randrange(1, 5000),), value, dtype=torch.uint8).to(device)
        held.append((x, value))
        if rng.random() < 0.4:
            held.pop(rng.randrange(len(held)))
    for x, value in held:
        assert (x.cpu() == value).all()


def test_tensors_of_no_elements_have_their_own_storage(device):
    a, b = (torch.empty(0, device=device) for _ in range(2))
    assert a.untyped_storage()._cdata != b.untyped_storage()._cdata
    assert a.cpu().shape == (0,) and torch.zeros(0, 3).to(device).cpu().shape == (0, 3)


def test_out_of_memory_is_an_error_and_nothing_else(device, budget):
    torch.spiral.set_memory_budget(torch.spiral.memory_reserved() + 64 * MiB)
    x = torch.full((20 * MiB,), 3, dtype=torch.uint8).to(device)
    retries = torch.spiral.memory_stats()["num_alloc_retries"]
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 60.00 MiB.*SPIRAL_MEMORY_BUDGET"):
        empty(device, 60 * MiB)
    stats = torch.spiral.memory_stats()
    assert stats["num_ooms"] >= 1 and stats["num_alloc_retries"] > retries
    assert (x.cpu() == 3).all()
    assert empty(device, 30 * MiB).numel() == 30 * MiB


def test_the_cache_makes_way(device, budget):
    torch.spiral.set_memory_budget(torch.spiral.memory_reserved() + 64 * MiB)
    for size in (40 * MiB, 50 * MiB, 60 * MiB):  # none fits beside a cached one
        assert empty(device, size).numel() == size


def test_fraction(device, budget):
    total = torch.spiral.mem_get_info()[1]
    torch.spiral.set_per_process_memory_fraction(0.25)
    assert torch.spiral.get_memory_budget() == int(total * 0.25)
    assert torch.spiral.get_per_process_memory_fraction() == pytest.approx(0.25)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError):
            torch.spiral.set_per_process_memory_fraction(wrong)
    with pytest.raises(ValueError):
        torch.spiral.set_memory_budget(-1)


def test_larger_than_a_buffer_can_be(device):
    limit = torch.spiral.get_device_properties(device).max_allocation
    if limit > 1 << 50:
        pytest.skip("the device has no such limit")
    with pytest.raises(torch.OutOfMemoryError, match=r"largest buffer|out of memory"):
        empty(device, limit + 4096)


def test_larger_than_a_binding(device, clean_memory):
    p = torch.spiral.get_device_properties(device)
    size = p.max_binding + 4096
    if size > min(p.max_allocation, 1 << 30):
        pytest.skip("bindings see whole buffers")
    x = empty(device, size)
    tail = torch.arange(100, dtype=torch.uint8)
    x[-100:].copy_(tail)
    assert torch.equal(x[-100:].cpu(), tail)
    # What is freed is not cut up: small tensors must stay reachable through one binding.
    address = x.data_ptr()
    del x
    y = empty(device, 20 * MiB)
    assert not address <= y.data_ptr() < address + size


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        pytest.param(torch.float16, marks=pytest.mark.full),
        pytest.param(torch.bool, marks=pytest.mark.full),
    ],
)
def test_operations_across_bindings(device, dtype, clean_memory):
    """Fills, copies, pointwise operations, scattered stores and reductions of elements narrower than a word, on both sides of the
    border between two bindings."""
    p = torch.spiral.get_device_properties(device)
    border = p.max_binding // dtype.itemsize
    if p.max_binding + 4096 > min(p.max_allocation, 1 << 30):
        pytest.skip("bindings see whole buffers")
    x = torch.ones(border + 1001, dtype=dtype, device=device)
    x[border - 5 : border + 6] = 0
    assert x.count_nonzero().item() == x.numel() - 11
    pattern = (torch.arange(x.numel() - 3) % 7 == 3).to(dtype)
    x[3:].copy_(pattern.to(device))
    y = x ^ x if dtype == torch.bool else x * x
    strided = x[1::2]
    strided.copy_(strided.logical_not())
    wanted = torch.cat([torch.ones(3, dtype=dtype), pattern])
    assert y.any().item() == (dtype != torch.bool)
    wanted[1::2] = wanted[1::2].logical_not().to(dtype)
    for part in (slice(0, 50), slice(border - 50, border + 50), slice(-50, None)):
        assert torch.equal(x[part].cpu(), wanted[part])
    assert x.count_nonzero().item() == wanted.count_nonzero().item()


def test_the_budget_of_the_environment():
    code = "import torch; print(torch.spiral.get_memory_budget(), torch.spiral.mem_get_info()[1])"

    def run(value):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                              env={**os.environ, "SPIRAL_MEMORY_BUDGET": value})  # fmt: skip
        return done.stdout.split(), done.stderr

    assert run("300M")[0][0] == str(300 * MiB)
    (half, total), _ = run("50%")
    assert int(half) == pytest.approx(int(total) / 2, rel=1e-6)
    assert "SPIRAL_MEMORY_BUDGET=lots" in run("lots")[1]


@pytest.mark.skipif(sys.platform == "win32", reason="no ulimit")
@pytest.mark.skipif("opencl" not in engines(), reason="CUDA's driver does not start under such a limit")
def test_few_addresses():
    # A limit on addresses: the reservation shrinks to it. PoCL itself wants some gigabytes.
    code = "import torch; x = torch.ones(1000).to('spiral'); print(x.cpu().sum().item())"
    done = subprocess.run(["bash", "-c", f'ulimit -v 12000000; exec {sys.executable} -c "{code}"'],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.stdout.strip() == "1000.0", done.stderr


def test_a_stray_host_read_faults():
    code = "import torch, ctypes; x = torch.ones(8).to('spiral'); ctypes.string_at(x.data_ptr(), 4)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode < 0


def test_views_keep_storage_and_offsets(device):
    x = torch.arange(24.0).to(device)
    y = x.view(4, 6)[1:, 2:]
    assert y.data_ptr() == x.data_ptr() + 8 * 4 and y.untyped_storage().data_ptr() == x.data_ptr()
    assert y.cpu().tolist() == torch.arange(24.0).view(4, 6)[1:, 2:].tolist()
    assert x.as_strided((3,), (2,), 5).cpu().tolist() == [5, 7, 9]
    assert x.unfold(0, 4, 8).cpu().tolist() == torch.arange(24.0).unfold(0, 4, 8).tolist()


def test_resize_keeps_contents(device):
    x = torch.arange(6.0).to(device)
    x.resize_(2, 2)
    assert x.cpu().tolist() == [[0, 1], [2, 3]]
    x.resize_(40000)
    assert x[:6].cpu().tolist() == [0, 1, 2, 3, 4, 5]
    storage = x.untyped_storage()
    storage.resize_(0)
    assert storage.nbytes() == 0
    storage.resize_(160000)
    x.copy_(torch.ones(40000))
    assert x.cpu().sum() == 40000
    y = torch.empty(2, 3, 4, 5, device=device).resize_(1, 3, 2, 2, memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_set(device):
    x = torch.arange(10.0).to(device)
    y = torch.empty(0, device=device)
    y.set_(x.untyped_storage(), 2, (2, 3), (3, 1))
    assert y.cpu().tolist() == [[2, 3, 4], [5, 6, 7]] and y.is_set_to(x[2:8].view(2, 3))
    y.set_(x)
    assert y.cpu().tolist() == x.cpu().tolist()
    y.set_()
    assert y.numel() == 0 and y.device == device
    with pytest.raises(RuntimeError, match="invalid storage offset"):
        y.set_(x.untyped_storage(), -1, (2,), (1,))


def test_write_epochs(device):
    x = torch.zeros(100).to(device)
    base = x.untyped_storage().data_ptr()
    before = _C.write_epoch(base)
    x.cpu()
    assert _C.write_epoch(base) == before
    x[3:5].copy_(torch.ones(2))
    after = _C.write_epoch(base)
    assert after > before
    x.copy_(torch.ones(100).to(device))
    assert _C.write_epoch(base) > after
    last = _C.write_epoch(base)
    del x
    y = torch.empty(100, device=device)
    assert y.data_ptr() != base or _C.write_epoch(base) > last


def test_threads(device, clean_memory):
    start = torch.spiral.memory_allocated()
    failures = []

    def work(seed):
        try:
            rng = random.Random(seed)
            held = []
            for _ in range(300):
                n = rng.randrange(1, 100000)
                held.append((torch.full((n,), n % 251, dtype=torch.uint8).to(device), n))
                if len(held) > 8:
                    x, m = held.pop(rng.randrange(len(held)))
                    if not (x.cpu() == m % 251).all():
                        raise AssertionError("contents changed")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert torch.spiral.memory_allocated() == start


OURS = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="memory is pinned by torch.cuda where there is one, and copies into it are waited for",
)


@OURS
def test_pinned_memory(device):
    x = torch.arange(1000.0).pin_memory()
    assert x.is_pinned() and x[10:].is_pinned() and not torch.ones(3).is_pinned()
    assert torch.empty(10, pin_memory=True).is_pinned()
    assert x.to(device, non_blocking=True).cpu().tolist() == x.tolist()
    with pytest.raises(RuntimeError, match="pin"):
        x.to(device).pin_memory()
    if hasattr(torch.accelerator, "empty_host_cache"):  # since torch 2.12
        torch.accelerator.empty_host_cache()


@OURS
def test_pinned_memory_outlives_the_read_into_it(device):
    source = torch.arange(1 << 20, dtype=torch.int32).to(device)
    for _ in range(20):
        pinned = torch.empty(1 << 20, dtype=torch.int32, pin_memory=True)
        pinned.copy_(source, non_blocking=True)
        address = pinned.data_ptr()
        del pinned
        other = torch.empty(1 << 20, dtype=torch.int32, pin_memory=True)
        assert other.data_ptr() != address  # not handed out while it may still be written
        torch.spiral.synchronize()
        del other


def test_loader_pins(device):
    data = torch.utils.data.TensorDataset(torch.arange(20.0).view(10, 2), torch.arange(10))
    total = 0
    for x, y in torch.utils.data.DataLoader(data, batch_size=4, pin_memory=True):
        assert x.is_pinned() and y.is_pinned()
        total += x.to(device, non_blocking=True).cpu().sum().item()
    assert total == sum(range(20))


def test_uninitialised_memory_is_filled_under_deterministic_algorithms(device):
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).cpu().isnan().all()
        assert (torch.empty_strided((2, 2), (1, 2), dtype=torch.int32, device=device).cpu() == 2**31 - 1).all()
    finally:
        torch.use_deterministic_algorithms(False)
