"""Streams, all in order on one queue, and events."""

import threading

import pytest
import torch


def work(device, megabytes=64):
    x = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    return [x.clone() for _ in range(3)]


def test_streams_are_distinct_objects(device):
    a, b = torch.spiral.Stream(), torch.spiral.Stream(device)
    assert a != b and a.device == b.device == device
    assert a == torch.spiral.Stream(stream_id=a.stream_id, device_index=a.device_index, device_type=a.device_type)
    assert isinstance(a, torch.Stream)
    assert torch.Stream(device).device == device


def test_current_stream(device):
    default = torch.spiral.current_stream()
    assert default == torch.spiral.default_stream() and default.device == device
    s = torch.spiral.Stream()
    with torch.spiral.stream(s):
        assert torch.spiral.current_stream() == s == torch.accelerator.current_stream()
        with torch.spiral.stream(None):
            assert torch.spiral.current_stream() == s
    assert torch.spiral.current_stream() == default
    torch.spiral.set_stream(s)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.spiral.current_stream(device)))
    thread.start()
    thread.join()
    assert seen == [default]  # per thread
    assert torch.spiral.current_stream() == s
    torch.spiral.set_stream(default)


def test_work_of_streams_is_in_order(device):
    a, b = torch.spiral.Stream(), torch.spiral.Stream()
    x = torch.zeros(1000, dtype=torch.int32).to(device)
    for step in range(20):
        with torch.spiral.stream(a if step % 2 else b):
            x.copy_(torch.full((1000,), step, dtype=torch.int32), non_blocking=True)
            y = x.clone()
        assert (y.cpu() == step).all()
    a.wait_stream(b)
    event = a.record_event()
    b.wait_event(event)
    b.synchronize()
    assert a.query() and b.query()


def test_record_stream(device):
    x = torch.ones(10).to(device)
    x.record_stream(torch.spiral.Stream())
    assert x.cpu().sum() == 10


def test_events(device):
    event = torch.spiral.Event()
    assert event.query()  # nothing to wait for
    event.synchronize()
    kept = work(device)
    event.record()
    event.synchronize()
    assert event.query()
    event.record(torch.spiral.Stream())  # again, on another stream
    event.wait()
    event.synchronize()
    del kept


def test_an_event_completes_without_a_synchronization(device):
    import time

    kept = work(device)
    event = torch.spiral.Event()
    event.record()
    end = time.monotonic() + 30
    while not event.query():
        assert time.monotonic() < end
    del kept


def test_elapsed_time(device):
    import time

    start, middle, end = (torch.spiral.Event(enable_timing=True) for _ in range(3))
    begin = time.perf_counter()
    start.record()
    kept = work(device)
    middle.record()
    kept += work(device)
    end.record()
    torch.spiral.synchronize()
    host = (time.perf_counter() - begin) * 1e3
    first, total = start.elapsed_time(middle), start.elapsed_time(end)
    assert 0 < first < total < host + 1
    assert total == pytest.approx(first + middle.elapsed_time(end), rel=0.2, abs=0.5)


def test_elapsed_time_of_wrong_events(device):
    timed, untimed, unrecorded = torch.spiral.Event(enable_timing=True), torch.spiral.Event(), torch.spiral.Event(True)
    timed.record()
    untimed.record()
    torch.spiral.synchronize()
    with pytest.raises((RuntimeError, ValueError)):
        timed.elapsed_time(untimed)
    with pytest.raises((RuntimeError, ValueError)):
        timed.elapsed_time(unrecorded)


def test_interprocess_events_are_refused(device):
    with pytest.raises(NotImplementedError):
        torch.spiral.Event(interprocess=True)


def test_events_of_another_device(device):
    count = torch.spiral.device_count()
    if count < 2:
        pytest.skip("one device")
    other = torch.device("spiral", (device.index + 1) % count)
    x = torch.full((1 << 20,), 7, dtype=torch.uint8).to(device)
    event = torch.spiral.Event()
    event.record()
    torch.spiral.current_stream(other).wait_event(event)
    assert (x.to(other).cpu() == 7).all()


def test_events_in_threads(device):
    failures = []

    def loop():
        try:
            with torch.spiral.device(device):
                for _ in range(100):
                    event = torch.spiral.Event(enable_timing=True)
                    event.record()
                    torch.ones(100).to(device)
                    event.synchronize()
                    if not event.query():
                        raise AssertionError("not completed")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=loop) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
