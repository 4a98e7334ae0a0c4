"""Writes the generated pages of docs/: python -m docs.generate

docs/coverage.md comes from the results that `python -m torch_spiral.testing coverage` left in .cache/coverage.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    from torch_spiral.testing import coverage, report

    if not any(coverage.CACHE.glob("spiral-*.jsonl")):
        print("no results yet: python -m torch_spiral.testing coverage --engine opencl", file=sys.stderr)
        return 1
    from torch_spiral.testing import checks

    ours = checks.native_ops()
    native = {name for name, item in checks.items().items() if getattr(item.info, "aten_name", name) in ours}
    report.write(Path(__file__).parent / "coverage.md", native)
    print("wrote docs/coverage.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
