"""`python -m tests.fuzz --cases 20000`: exit 1 where there is a finding."""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.fuzz.runner import TIME_S, run_cases


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=TIME_S, help="for one case")
    args = parser.parse_args()
    numbers = range(args.start, args.start + args.cases) if args.only is None else [args.only]
    started = time.monotonic()
    outcome = run_cases(args.seed, numbers, args.jobs, args.seconds)
    sys.stdout.write(f"{outcome}\n{time.monotonic() - started:.0f} s, {len(outcome.findings)} findings\n")
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
