"""Runs checks in a process of its own, so that a crash or a hang costs one check.

Reads one JSON request a line from standard input, answers with one JSON line each on the standard output it was
given; whatever else is printed goes to standard error.
    {"list": true}  -> {"tasks": [[op, kind, dtype], ...], "device": ..., "torch": ...}
    {"op": ..., "dtype": ..., "check": ..., "limit": ...}
                    -> {"status": "pass" | "fail" | "n/a", "samples": n, "message": ..., "seconds": ...,
                        "host": {host op: [calls, bytes copied]}}
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    device_name, engine = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None

    import warnings

    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    from torch_spiral.testing import checks, devices

    device = devices.resolve(device_name, engine)
    items = checks.items()
    for line in sys.stdin:
        request = json.loads(line)
        if "list" in request:
            tasks = [(i.name, i.kind, str(d).removeprefix("torch.")) for i in items.values() for d in i.dtypes]
            answer = {
                "tasks": tasks,
                "device": devices.describe(device),
                "torch": torch.__version__,
            }
        else:
            answer = run(items[request["op"]], request, device, checks)
        answers.write(json.dumps(answer) + "\n")


def run(item, request, device, checks) -> dict:
    """One check of one (op, dtype)."""
    import torch

    if request["check"] == "differential":
        from torch_spiral.testing.differential import check
    else:
        check = checks.CHECKS[item.kind][request["check"]]
    start = time.perf_counter()
    before, host_before = fallen(), host_ops()
    try:
        samples = check(item, getattr(torch, request["dtype"]), device, request["limit"])
        if device.type == "spiral":
            torch.spiral.synchronize(device)  # type: ignore[attr-defined]
        status, message = ("pass" if samples else "n/a"), ""
        if fallen() != before:
            status, message = "fail", "an op fell back to the CPU"
    except Exception as e:
        samples, status, message = 0, "fail", " ".join(str(e).split()) or type(e).__name__
        if not isinstance(e, checks.Mismatch):
            message = f"{type(e).__name__}: {message}"
    except BaseException as e:  # a panic of an engine's library arrives as one
        samples, status, message = 0, "fail", f"{type(e).__name__}: {e}"
    return {
        "status": status,
        "samples": samples,
        "message": message[:2000],
        "seconds": round(time.perf_counter() - start, 4),
        "host": {
            name: [calls - host_before.get(name, (0, 0))[0], size - host_before.get(name, (0, 0))[1]]
            for name, (calls, size) in host_ops().items()
            if (calls, size) != host_before.get(name)
        },
    }


def host_ops() -> dict[str, tuple[int, int]]:
    """Calls of declared host ops and the bytes copied for them, so far."""
    import torch

    module = getattr(torch, "spiral", None)
    return module.host_ops() if module is not None else {}


def fallen() -> int:
    """Fallbacks so far."""
    from torch_spiral.testing.devices import fallbacks

    return fallbacks()


if __name__ == "__main__":
    main()
