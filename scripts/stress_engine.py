#!/usr/bin/env python3
"""Many random schedules of the engine, each checked against the original models.

    python scripts/stress_engine.py [COUNT] [FIRST_SEED]

Prints what was covered; exits 1 with the seeds of those that failed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from engine_workloads import Outcome, Pairs, run


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    pairs, total, failed = Pairs(), Outcome(), []
    began = time.perf_counter()
    for done, seed in enumerate(range(first, first + count), 1):
        try:
            total += run(seed, pairs)
        except Exception as problem:
            failed.append(seed)
            print(f"seed {seed}: {type(problem).__name__}: {problem}", flush=True)
        if done % 500 == 0:
            print(f"{done} in {time.perf_counter() - began:.0f} s: {total}", flush=True)
    print(f"{count} schedules, {len(failed)} failed {failed[:20]}: {total}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
