"""Command line of the upstream tests: coverage, upstream, differential, ledger."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    from torch_spiral.testing import coverage, devices, differential, ledger, upstream

    parser = argparse.ArgumentParser(prog="python -m torch_spiral.testing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    coverage.add_arguments(
        commands.add_parser("coverage", help="upstream's op, module and optimizer tables against the CPU, op by op")
    )
    upstream.add_arguments(commands.add_parser("upstream", help="upstream's own test files, from a PyTorch checkout"))
    differential.add_arguments(
        commands.add_parser("differential", help="one engine against the other, on op_db's samples")
    )
    check = commands.add_parser("ledger", help="check tests/upstream/expectations.yaml")
    check.add_argument("--against", metavar="REVISION", help="refuse a ledger larger than at this git revision")
    commands.add_parser("engines", help="the engines that have a device here")
    args = parser.parse_args()
    if args.command == "engines":
        print(*devices.engines())
        return 0
    if args.command == "ledger":
        wrong = ledger.check(args.against)
        print("\n".join(wrong) or "the ledger is in order")
        return 1 if wrong else 0
    return {"coverage": coverage, "differential": differential, "upstream": upstream}[args.command].main(args)


if __name__ == "__main__":
    sys.exit(main())
