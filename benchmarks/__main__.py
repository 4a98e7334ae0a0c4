"""Runs the benchmark suites one after another, each in its own process: python -m benchmarks [arguments of a suite]."""

import subprocess
import sys

SUITES = ("overhead", "device", "models", "compile")

if __name__ == "__main__":
    status = [subprocess.call([sys.executable, "-m", f"benchmarks.{s}", *sys.argv[1:]]) for s in SUITES]
    sys.exit(max(status))
