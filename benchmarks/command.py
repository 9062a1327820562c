"""Whole commands for benchmarks: rows on disk, a command in a process of its own, and the machine it ran on."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.setting import GIB, WORDS
from smolvlm_exp.utils.cores import usable_cores
from smolvlm_exp.utils.versions import versions

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("python", "torch", "transformers", "trl", "peft", "bitsandbytes")  # of the packages' versions


@dataclass(frozen=True)
class Finished:
    """A command that ended well."""

    seconds: float  # from the start of its process to the end
    peak: int  # bytes: resident memory of the largest of its processes
    phases: Mapping[str, float]  # seconds, as its summary.json has them; empty where it has none


def make_rows(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write `pairs.jsonl` over as many JPEG images, no two alike, with answers of 50 to 110 words.

    Args:
        size: width and height of an image in pixels.
    """
    draw, words = np.random.default_rng(0), np.array(WORDS)
    folder.mkdir(parents=True)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as lines:
        for i in range(count):
            noise = draw.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
            Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=88)
            chosen, rejected = (" ".join(draw.choice(words, draw.integers(50, 111))) + "." for _ in range(2))
            row = {"image": f"{i}.jpg", "question": "Describe it in detail.", "chosen": chosen, "rejected": rejected}
            lines.write(json.dumps(row) + "\n")


def empty_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run_command(arguments: Sequence[str], log: Path, cache: Path) -> tuple[float, int]:
    """Run `python ARGUMENTS` from the repository's folder, without a network.

    Args:
        log: the file for what it prints.
        cache: the folder for what libraries keep of a run: data sets, compiled kernels.

    Returns:
        seconds on the clock, and the most resident memory of one of its processes in bytes.
    """
    kept = {"HF_DATASETS_CACHE": str(cache / "datasets"), "TRITON_CACHE_DIR": str(cache / "triton")}
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | kept | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    seconds, process.returncode = time.perf_counter() - began, os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"{end}\npython {' '.join(arguments)} ended with exit code {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


def run_smolvlm_exp(overrides: Sequence[str], name: str, work: Path) -> Finished:
    """`python -m smolvlm_exp OVERRIDES` with its run folder `name` in `work`; runs in one `work` share their caches."""
    folder, cache = work / name, work / "cache"
    work.mkdir(parents=True, exist_ok=True)
    own = ("tracker=none", f"hydra.run.dir={folder}", f"trainer.cache={cache / 'trainer'}")
    seconds, peak = run_command(["-m", "smolvlm_exp", *overrides, *own], work / f"{name}.log", cache)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return Finished(seconds, peak, summary.get("seconds_by_phase", {}))


def phase_table(runs: Mapping[str, Finished]) -> list[str]:
    """Markdown: the seconds of each phase, what none of them counts, and all together; a column for each run."""
    phases = dict.fromkeys(phase for run in runs.values() for phase in run.phases)
    lines = [f"| seconds | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
    for phase in phases:
        lines.append(f"| {phase} | {' | '.join(f'{run.phases.get(phase, 0):.1f}' for run in runs.values())} |")
    if phases:
        left = (run.seconds - sum(run.phases.values()) for run in runs.values())
        lines.append(f"| start, end and what no phase counts | {' | '.join(f'{each:.1f}' for each in left)} |")
    return [*lines, f"| **all** | {' | '.join(f'**{run.seconds:.1f}**' for run in runs.values())} |"]


def machine() -> str:
    """Hardware, versions and commit, as a table in RESULTS.md names them."""
    import torch

    known = versions()
    packages = ", ".join(f"{name} {known[name]}" for name in SHOWN if name in known)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"{device}, {usable_cores()} cores of {processor_name()}, {memory:.0f} GiB; {packages}; commit {commit()}"


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit() -> str:
    """Short, with `+` where files differ from it; `unknown` in a copy without its history."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
    return head.stdout.strip() + "+" * bool(changed)
