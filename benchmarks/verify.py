"""Correct first, then fast: runs the scan's tests, then its benchmark, and compares ratios with stored ones.

    python benchmarks/verify.py              # tests, S1 and S2, table; fails if a ratio fell by over 20 %
    python benchmarks/verify.py --full       # S1 to S5
    python benchmarks/verify.py --store      # makes this machine's ratios those of its instruction set

Ratios (a peer's time over ours, alternating in one process) travel between machines better than times do, but
not from AVX-512 to AVX2, which halves our vectors and not the peers' time in Python and in memory: they are
stored for each instruction set.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mambastyle.ops.cpu_vectors import instruction_set

ROOT = Path(__file__).parents[1]
STORED = Path(__file__).with_name("stored_ratios.json")
TOLERANCE = 0.8


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all shapes instead of S1 and S2")
    parser.add_argument("--store", action="store_true", help="store the ratios instead of comparing")
    parser.add_argument("--skip-tests", action="store_true", help="they have just run")
    arguments = parser.parse_args()
    if not arguments.skip_tests:
        tests = subprocess.run([sys.executable, "-m", "pytest", "tests/ops"], cwd=ROOT, check=False)
        if tests.returncode:
            print("no timings on a red test")
            return tests.returncode
    ratios = scan_ratios(full=arguments.full)
    instructions, _ = instruction_set()
    every = json.loads(STORED.read_text()) if STORED.is_file() else {}
    stored = every.get(instructions, {})
    if not stored and not arguments.store:
        print(f"no ratios are stored for {instructions}: nothing to compare with (--store)")
    failed = False
    print(f"{'shape, pass, peer':40} {'ratio':>8} {'stored':>8}")
    for name, ratio in ratios.items():
        before = stored.get(name)
        slower = before is not None and ratio < TOLERANCE * before
        failed |= slower
        mark = "  slower" if slower else ""
        print(f"{name:40} {ratio:8.1f} {'' if before is None else format(before, '8.1f'):>8}{mark}")
    if arguments.store:
        every[instructions] = stored | ratios
        STORED.write_text(json.dumps(every, indent=2) + "\n")
        return 0
    return int(failed)


def scan_ratios(*, full: bool) -> dict[str, float]:
    """'S2 forward mambapy' -> how many times our time the peer took."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "scan.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "scan.py"), "--json", str(report)]
        subprocess.run([*command, *([] if full else ["--quick"])], cwd=ROOT, check=True)
        results: dict[str, Any] = json.loads(report.read_text())["results"]
    return {
        f"{shape} {kind} {peer}": round(figure["times_numba"], 1)
        for shape, kinds in results.items()
        for kind, figures in kinds.items()
        if kind != "shape"
        for peer, figure in figures.items()
        if peer != "numba"
    }


if __name__ == "__main__":
    sys.exit(main())
