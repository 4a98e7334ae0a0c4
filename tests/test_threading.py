"""Many threads on one device, and waits that let others work."""

import sys
import threading
import time

import pytest
import torch


def together(count, body):
    """Runs body(i) in `count` threads at once; raises the first error."""
    barrier, failures = threading.Barrier(count), []

    def run(i):
        try:
            barrier.wait()
            body(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
        assert not t.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


@pytest.fixture
def eager_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_copies(device, eager_switching):
    def body(i):
        for step in range(100):
            value = (i * 37 + step) % 251
            x = torch.full((1 + 997 * (step % 17),), value, dtype=torch.uint8).to(device)
            y = x.clone()
            del x
            assert (y.cpu() == value).all()

    together(4, body)


def test_each_thread_has_its_current_device(device):
    count = torch.spiral.device_count()

    def body(i):
        for _ in range(50):
            torch.spiral.set_device(i % count)
            time.sleep(0)
            assert torch.spiral.current_device() == i % count
            assert torch.empty(3, device="spiral").device.index == i % count

    together(4, body)
    assert torch.spiral.current_device() == device.index


def test_all_devices_at_once():
    def body(i):
        index = i % torch.spiral.device_count()
        for step in range(50):
            x = torch.full((5000,), step, dtype=torch.int32).to(f"spiral:{index}")
            assert (x.clone().cpu() == step).all()

    together(4, body)


def test_first_use_by_many_threads():
    import subprocess

    code = """
import threading, torch
out = []
def f(): out.append(torch.ones(100).to("spiral").cpu().sum().item())
threads = [threading.Thread(target=f) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(set(out), len(out))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "{100.0} 8", done.stderr


def test_waiting_lets_python_run(device):
    # A wait that kept the GIL would stop the counter.
    x = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    ticks, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            ticks[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before, start = ticks[0], time.perf_counter()
        while time.perf_counter() - start < 0.3:
            for _ in range(4):
                y = x.clone()
            torch.spiral.synchronize()
        seen = ticks[0] - before
    finally:
        stop.set()
        thread.join()
    assert seen > 1000
    del y


def test_tensors_die_in_other_threads(device, eager_switching):
    start = torch.spiral.memory_allocated()
    box: list = []

    def body(i):
        for _ in range(200):
            if i % 2:
                box.append(torch.empty(1000, device=device))
            else:
                try:
                    box.pop()
                except IndexError:
                    time.sleep(0)

    together(4, body)
    box.clear()
    assert torch.spiral.memory_allocated() == start


def test_statistics_and_emptying_while_others_allocate(device, eager_switching):
    def body(i):
        for step in range(60):
            if i == 0:
                torch.spiral.empty_cache()
                torch.spiral.memory_stats()
                torch.spiral.synchronize(device)
            else:
                x = torch.full((100000 * (1 + step % 5),), i, dtype=torch.uint8).to(device)
                assert (x.cpu() == i).all()

    together(4, body)


def test_finalisers_may_free(device):
    # A tensor that dies in the garbage collector, in whatever thread that runs, under whatever lock.
    import gc

    class Cycle:
        def __init__(self):
            self.me, self.tensor = self, torch.ones(10000).to(device)

    def body(_):
        for _ in range(100):
            Cycle()
            torch.ones(100).to(device).clone()
        gc.collect()

    threshold = gc.get_threshold()
    gc.set_threshold(10, 2, 2)
    try:
        together(3, body)
    finally:
        gc.set_threshold(*threshold)


def test_backward_in_threads(device):
    def body(i):
        w = torch.ones(50, requires_grad=True)
        for _ in range(20):
            (w.to(device).cpu() * i).sum().backward()
        assert torch.equal(w.grad, torch.full((50,), 20.0 * i))

    together(4, body)
