"""Many rows: what a run over a large folder of images costs before and around its ten steps, and a second run.

    python -m benchmarks.many_rows [--rows 20000] [--cores 2]
    python -m benchmarks.many_rows --rows 500      a minute

The embedded model over as many JPEG images of 320 x 240, one pair each, of which a hundredth is held out. The second
run finds everything in the caches. Prints a table for RESULTS.md: seconds by phase, memory, and the caches' size.
"""

import argparse
import os
import time
from pathlib import Path

from benchmarks.command import empty_folder, machine, make_rows, phase_table, run_smolvlm_exp
from benchmarks.setting import GIB

SIZE, STEPS = (320, 240), 10


def mebibytes(folder: Path) -> float:
    """What all files below take on the disk."""
    return sum(file.lstat().st_blocks * 512 for file in folder.rglob("*")) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--cores", type=int, default=2, help="that the commands may use")
    asked = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.cores])
    work = empty_folder(Path("outputs/benchmark/many_rows").resolve())
    began = time.perf_counter()
    make_rows(work / "rows", asked.rows, SIZE)
    print(f"{machine()}\n{asked.rows:,} rows of {mebibytes(work / 'rows'):.0f} MiB made in "
          f"{time.perf_counter() - began:.0f} s\n", flush=True)  # fmt: skip
    overrides = (
        "data=files", f"data.folder={work / 'rows'}", "data.test_fraction=0.01", f"trainer.max_steps={STEPS}"
    )  # fmt: skip
    runs = {name: run_smolvlm_exp(overrides, name, work) for name in ("first", "second")}
    print("\n".join(phase_table(runs)))
    print(f"| peak of its largest process, GiB | {' | '.join(f'{run.peak / GIB:.2f}' for run in runs.values())} |")
    caches = (f"{folder.name} {mebibytes(folder):.1f}" for folder in sorted((work / "cache").iterdir()))
    print(f"\ncaches on disk, MiB: {', '.join(caches)}")


if __name__ == "__main__":
    main()
