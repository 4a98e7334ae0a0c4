"""Devices: which there are, which is current, what PyTorch's own interfaces say of them, and how a process ends."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import torch_spiral


def run(code, **environment):
    """Runs Python code in a fresh process; its standard output, stripped. Fails the test where the process fails."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "SPIRAL_FALLBACK": "error", **environment},
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def test_properties(device):
    p = torch.spiral.get_device_properties(device)
    assert p.index == device.index and p.name == torch.spiral.get_device_name(device.index)
    assert p.engine in {"opencl", "wgpu", "cuda", "hip"}
    assert p.language in {"opencl", "wgsl", "triton"} and p.schedule_class in {"vector", "simt", "block"}
    assert p.max_binding > 0 and p.max_allocation > 0 and p.total_memory > 1 << 20
    assert p.multi_processor_count == p.compute_units >= 1


def test_capability(device):
    dtypes = torch.spiral.get_device_capability(device)["supported_dtypes"]
    assert {torch.float32, torch.float16, torch.int64, torch.bool} <= set(dtypes)
    assert (torch.float64 in dtypes) == torch.spiral.get_device_properties(device).float64


def test_best_first():
    rank = {"discrete_gpu": 0, "integrated_gpu": 1, "cpu": 2, "software": 3}
    kinds = [rank[torch.spiral.get_device_properties(i).type] for i in range(torch.spiral.device_count())]
    assert kinds == sorted(kinds)


def test_current_device_and_context(device):
    before = torch.spiral.current_device()
    assert before == device.index
    assert torch.empty(1, device="spiral").device == device
    for other in range(torch.spiral.device_count()):
        with torch.spiral.device(other):
            assert torch.spiral.current_device() == other
            assert torch.empty(1, device="spiral").device.index == other
            with torch.spiral.device(-1):
                assert torch.spiral.current_device() == other
        with torch.spiral.device_of(torch.empty(1, device=f"spiral:{other}")):
            assert torch.spiral.current_device() == other
    with torch.spiral.device_of(torch.empty(1)):
        assert torch.spiral.current_device() == before
    assert torch.spiral.current_device() == before


def test_indices_are_checked(device):
    count = torch.spiral.device_count()
    for use in (torch.spiral.set_device, torch.spiral.synchronize, torch.spiral.get_device_properties,
                lambda i: torch.empty(1, device=f"spiral:{i}")):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"spiral:{count}"):
            use(count)
    with pytest.raises(ValueError, match="cpu"):
        torch.spiral.synchronize("cpu")
    assert torch.spiral.current_device() == device.index


def test_methods(device):
    x = torch.ones(3).spiral()
    assert x.is_spiral and x.device == device and not torch.ones(3).is_spiral
    assert x.untyped_storage().is_spiral
    assert next(torch.nn.Linear(2, 2).spiral().parameters()).is_spiral


def test_accelerator(device):
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator().type == "spiral"
    assert torch.accelerator.device_count() == torch.spiral.device_count()
    assert torch.accelerator.current_device_index() == device.index
    torch.accelerator.set_device_index(device.index)
    torch.accelerator.synchronize()
    with torch.accelerator.device_index(0):
        assert torch.accelerator.current_device_index() == 0


def test_synchronize_is_idempotent(device):
    torch.ones(10, device=device)
    for _ in range(3):
        torch.spiral.synchronize()


def test_autoload_without_an_import():
    assert (
        run("import torch; print(torch.device('spiral'), torch.ones(2).to('spiral').cpu().tolist())")
        == "spiral [1.0, 1.0]"
    )


def test_autoload_leaves_torch_cuda_alone():
    """A PyTorch with CUDA differentiates on it only while it is the one accelerator."""
    code = (
        "import torch; torch.version.cuda = '13.0'; import torch_spiral_autoload, sys; torch_spiral_autoload.load(); "
    )
    environment = {k: v for k, v in os.environ.items() if k != "SPIRAL_AUTOLOAD"} | {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"
    }
    for wanted, expected in (("", False), ("SPIRAL_AUTOLOAD", True)):
        done = subprocess.run(
            [sys.executable, "-c", code + "print('torch_spiral' in sys.modules)"],
            env={**environment, **({wanted: "1"} if wanted else {})}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.stdout.strip() == str(expected), done.stderr


def test_import_before_torch():
    assert run("import torch_spiral, torch; print(torch.ones(2).to('spiral').cpu().tolist())") == "[1.0, 1.0]"


def test_import_looks_for_no_device():
    assert run("import torch; torch.manual_seed(1); from torch_spiral import _C; print(_C.devices_known())") == "False"


@pytest.mark.parametrize("engine", ["opencl", "wgpu"])
def test_engine_filter(engine):
    out = run(
        """
        import torch
        print({torch.spiral.get_device_properties(i).engine for i in range(torch.spiral.device_count())})
        """,
        SPIRAL_ENGINE=engine,
    )
    assert out in (str({engine}), "set()")
    if any(r["engine"] == engine and r["devices"] for r in torch.spiral.engines()):
        assert out == str({engine})


def test_visible_devices():
    count = "import torch; print(torch.spiral.device_count())"
    assert run(count, SPIRAL_VISIBLE_DEVICES="") == "0"
    assert run(count, SPIRAL_VISIBLE_DEVICES="0") == "1"
    assert run(count, SPIRAL_VISIBLE_DEVICES="0,99,0") == "1"
    last = torch.spiral.device_count() - 1
    name = "import torch; print(torch.spiral.get_device_name(0))"
    assert run(name, SPIRAL_VISIBLE_DEVICES=str(last)) == torch.spiral.get_device_name(last)
    why = "import torch; print([r for r in torch.spiral.engines() if r['engine'] in ('opencl', 'wgpu')])"
    assert "left out by SPIRAL_VISIBLE_DEVICES=99" in run(why, SPIRAL_VISIBLE_DEVICES="99", SPIRAL_ENGINE="")


def test_no_device_says_why():
    out = run(
        """
        import torch
        assert not torch.spiral.is_available() and torch.spiral.device_count() == 0
        torch.manual_seed(1)
        try:
            torch.ones(1, device="spiral")
        except RuntimeError as e:
            print(e)
        """,
        SPIRAL_ENGINE="nonsense",
    )
    assert "No spiral device" in out and "SPIRAL_ENGINE" in out and "python -m torch_spiral" in out


def test_broken_engine_library_is_reported():
    out = run(
        "import torch; print([r['why'] for r in torch.spiral.engines() if r['engine'] == 'wgpu'])",
        SPIRAL_WGPU_LIBRARY="/nowhere/libwgpu_native.so",
        SPIRAL_ENGINE="",
    )
    assert "/nowhere/libwgpu_native.so" in out


def test_backward_on_the_cpu_before_the_first_use():
    # Autograd's engine counts devices when it first runs.
    run(
        """
        import torch
        torch.ones(1, requires_grad=True).mul(2).backward()
        assert torch.ones(2).to("spiral").cpu().tolist() == [1, 1]
        """
    )


def test_fork_after_use_raises_in_the_child():
    out = run(
        """
        import os, torch
        x = torch.ones(2).to("spiral")
        torch.spiral.synchronize()
        pid = os.fork()
        if pid == 0:
            try:
                assert torch.spiral._is_in_bad_fork()
                torch.manual_seed(1)
                del x
                torch.ones(2).to("spiral")
            except RuntimeError as e:
                print("spawn" in str(e), flush=True)
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        print(x.cpu().tolist())
        """
    )
    assert out == "True\n[1.0, 1.0]"


def test_fork_before_use_works():
    run(
        """
        import os, torch
        pid = os.fork()
        assert torch.ones(2).to("spiral").cpu().tolist() == [1, 1]
        if pid == 0:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        """
    )


@pytest.mark.parametrize(
    "ending", ["", "raise SystemExit(0)", "keep = [x]; keep.append(keep)", "torch.spiral.empty_cache()"]
)
def test_exit_right_after_backward(ending):
    for _ in range(3):
        run(
            f"""
            import torch
            x = torch.ones(1000).to("spiral")
            w = torch.ones(1000, requires_grad=True)
            w.to("spiral").to("cpu").sum().backward()
            {ending}
            """
        )


def test_exit_while_a_daemon_thread_works():
    """On the CPU such a thread aborts the process: it takes the GIL after the interpreter's end."""
    done = run(
        """
        import threading, time, torch
        started = threading.Event()

        def work():
            x = torch.ones(64, 64, device="spiral")
            while True:
                x = (x @ x).clamp(max=1)
                x.sum().item()
                started.set()

        threading.Thread(target=work, daemon=True).start()
        started.wait()
        time.sleep(0.02)
        print("end")
        """
    )
    assert done == "end"


def test_data_parallel_passes_calls_on(device):
    model = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    expected = model(x)
    if torch.cuda.is_available():
        pytest.skip("it takes CUDA's devices where there are any, and moves the module there")
    assert torch.equal(torch.nn.DataParallel(model)(x), expected)
    got = torch.nn.DataParallel(model.to(device), device_ids=[0])(x.to(device))
    torch.testing.assert_close(got.cpu(), expected)


def test_dlpack_is_refused(device):
    if torch.spiral.get_device_properties(device).engine in ("cuda", "hip"):
        pytest.skip("memory that other libraries can read: tests/test_cuda_engine.py")
    x = torch.ones(2).to(device)
    for export in (lambda: x.__dlpack__(), lambda: torch.utils.dlpack.to_dlpack(x), lambda: torch.from_dlpack(x)):
        with pytest.raises((BufferError, ValueError), match=r"spiral|Unknown device type"):
            export()
    with pytest.raises(TypeError, match="cpu"):
        x.numpy()


def test_lists_devices():
    done = subprocess.run([sys.executable, "-m", "torch_spiral", "--list"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Self-test" not in done.stdout
    assert torch_spiral.__version__ in done.stdout
    for i in range(torch.spiral.device_count()):
        assert f"spiral:{i}" in done.stdout


def test_self_test():
    command = [sys.executable, "-m", "torch_spiral"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") >= 5 * torch.spiral.device_count() and "GFLOP/s" in done.stdout


def test_a_reported_error_is_raised_once(device):
    x = torch.arange(10.0).to(device)
    embedding = torch.ones(4, 3).to(device)
    torch.nn.functional.embedding(torch.tensor([0, 7]).to(device), embedding)
    with pytest.raises(IndexError, match="7"):
        torch.spiral.synchronize()
    torch.spiral.synchronize()
    assert x.cpu().tolist() == list(range(10))


def test_moving_a_module_keeps_its_parameters(device):
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    weight, optimizer = first.weight, torch.optim.SGD(model.parameters(), 0.5)
    model.to(device)
    assert first.weight is weight and second.weight is weight and weight.device.type == "spiral"
    before = weight.detach().cpu()
    model(torch.ones(2, 3, device=device)).sum().backward()
    optimizer.step()
    assert not torch.equal(weight.detach().cpu(), before)
    model.cpu()
    assert first.weight is weight and weight.device.type == "cpu"


def test_moving_a_module_that_a_graph_holds_keeps_ties(device):
    first, second = torch.nn.Linear(3, 3).double(), torch.nn.Linear(3, 3).double()
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    held = model(torch.ones(2, 3, dtype=torch.double))
    model.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to(device)
    assert first.weight is second.weight and first.weight.device.type == "spiral" and held.requires_grad


def test_parts_that_come_in_with_their_first_use():
    code = "import sys, torch, torch_spiral\nassert not {'torch._inductor', 'sqlite3'} & set(sys.modules)\n"
    code += "print(torch_spiral.compiler.explain.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "explain", done.stderr
    with pytest.raises(AttributeError, match="nothing"):
        _ = torch_spiral.nothing
