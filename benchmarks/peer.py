"""What a person would use instead of the engine, on the same shape, rows and modules: Unsloth, plain TRL, liger-kernel.

    python -m benchmarks.peer --site FOLDER [--only 'unsloth/smolvlm/text/*,engine/smolvlm/*'] [--json FILE]

Each case has a process of its own (benchmarks/peer_case.py), which loads one base model with random weights (nf4,
double quantisation), puts LoRA with r=8 on the same modules, and trains 16 pairs a step on images of 512 x 384 with
answers of 40 to 200 tokens. The first step is left out of time. A case is named part/model/target/setting[/cap]:

unsloth   Unsloth at several micro-batches, with (4+) and without (4) its activation checkpointing
trl       plain TRL as it is
liger     plain TRL with liger-kernel's DPO loss and layers
engine    ours, planned by trainer.memory_budget

`text` adapts the text model, `all` both stacks. A cap is on what torch may allocate, so that a large card behaves like
a small one. Every case must begin with a loss of ln 2 and train as many parameters as the others of its target.

`--site` is a folder with Unsloth's environment, because it wants older versions than ours: over the torch that is
there, by `pip install --no-deps --target FOLDER`, unsloth and unsloth_zoo 2026.10.9, trl 1.15.0, transformers 5.17.0,
datasets 4.8.5, peft 0.21.2, bitsandbytes 0.50.2, torchao 0.18.0, diffusers 0.42.1, cut_cross_entropy 25.1.1,
hf_transfer 0.1.9, json5 0.17.3, msgspec 0.23.0, structlog 26.1.0, tyro 1.0.17, nest_asyncio 1.6.0, pydantic 2.14.4 and
what it pins, dill 0.4.1, multiprocess 0.70.19. liger-kernel 0.8.5 goes beside our own versions, without its needs too.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.command import ROOT, empty_folder, machine
from benchmarks.peer_case import Case
from benchmarks.run import save_model
from benchmarks.setting import compose, rows

MICRO = ("1+", "4+", "8+", "4", "8")
CASES = (
    *(f"unsloth/smolvlm/text/{setting}" for setting in MICRO),
    *(f"unsloth/smolvlm/text/{setting}/8GiB" for setting in ("1+", "2+", "4+", "1")),
    *(f"unsloth/smolvlm/all/{setting}" for setting in ("1+", "4+")),
    *(f"unsloth/smolvlm_256m/text/{setting}" for setting in ("8+", "16+", "8")),
    *(f"trl/smolvlm/text/{setting}" for setting in ("4+", "8")),
    *(f"liger/smolvlm/text/{setting}" for setting in MICRO),
    "liger/smolvlm/text/4+/8GiB",
    *(f"engine/{what}{cap}" for what in ("smolvlm/text/auto", "smolvlm/all/auto") for cap in ("", "/8GiB")),
    "engine/smolvlm_256m/text/auto",
)


def write_rows(model: str, weights: Path, count: int, file: Path) -> None:
    """Rows as TRL documents them, images included, in a file that older versions of `datasets` read too."""
    from smolvlm_exp.models.model import load_processor

    processor = load_processor(compose(f"model={model}", f"model.id={weights}").model)
    columns = ["images", "prompt", "chosen", "rejected"]
    rows(count, processor).select_columns(columns).to_parquet(file)


def run_case(name: str, weights: Path, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """What the case's process printed, or why it ended without."""
    log = folder / f"{name.replace('/', '_')}.log"
    path = os.environ.get("PYTHONPATH", "")
    if Case.named(name).part == "unsloth":
        path = os.pathsep.join((str(ROOT), str(asked.site.resolve())))
    command = [
        sys.executable, "-m", "benchmarks.peer_case", name, "--weights", str(weights), "--folder", str(folder),
        "--steps", str(asked.steps),
    ]  # fmt: skip
    environment = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as output:
        try:  # in its folder, because Unsloth writes the code that it compiles where it stands
            subprocess.run(
                command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, timeout=asked.seconds,
                env=os.environ | environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"case": name, "error": f"stopped after {asked.seconds} s"}
    return result(name, log.read_text(encoding="utf-8", errors="replace"))


def result(name: str, printed: str) -> dict[str, Any]:
    """The case's JSON line among all that libraries print; without one, their last line is the error."""
    lines = [line for line in printed.splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if line.startswith('{"case": ')), None)
    if found is None:
        return {"case": name, "error": lines[-1] if lines else "printed nothing"}
    return json.loads(found)


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a line for each case."""
    lines = ["| case | s/pair | once, s/pair | peak GiB | first loss | trained |", "|---" * 6 + "|"]
    for each in found:
        if not each.get("seconds"):
            lines.append(f"| {each['case']} | {each.get('error', 'out of memory')} | | | | |")
            continue
        once = f"{each['once']:.4f}" if each.get("once") else ""
        lines.append(f"| {each['case']} | {each['seconds']:.4f} | {once} | {each.get('peak', 0):.2f} | "
                     f"{each['first loss']:.4f} | {each['trained']:,} |")  # fmt: skip
    return lines


def comparisons(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The engine against each other part's best setting of the same model, modules and cap."""
    best: dict[tuple[str, str, str | None], dict[str, Mapping[str, Any]]] = {}
    for each in sorted((each for each in found if each.get("seconds")), key=lambda each: -each["seconds"]):
        case = Case.named(each["case"])
        best.setdefault((case.model, case.target, case.cap), {})[case.part] = each  # the last is the fastest
    lines = []
    for parts in best.values():
        ours = parts.pop("engine", None)
        for each in parts.values() if ours else ():
            ratio, counting_once = (each["seconds"] / seconds for seconds in
                                    (ours["seconds"], ours["seconds"] + ours.get("once", 0)))  # fmt: skip
            lines.append(f"{ours['case']}: {ratio:.1f} x {each['case']}, {counting_once:.1f} x over a single epoch")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=None, help="a folder with Unsloth's environment")
    parser.add_argument("--only", default="*", help="patterns of names of cases")
    parser.add_argument("--rows", type=int, default=64, help="a multiple of 16, so that every step is full")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300, help="after which a case is stopped")
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    chosen = [name for name in CASES if any(fnmatch(name, pattern) for pattern in asked.only.split(","))]
    if not chosen:
        parser.error(f"--only={asked.only} matches none of {', '.join(CASES)}")
    if asked.site is None and any(name.startswith("unsloth/") for name in chosen):
        parser.error("Unsloth's cases need --site")
    work, found = empty_folder(Path("outputs/benchmark/peer").resolve()), []
    print(machine(), flush=True)
    for model in dict.fromkeys(Case.named(name).model for name in chosen):
        folder = empty_folder(work / model)
        weights = save_model(model, folder / "model")
        write_rows(model, weights, asked.rows, folder / "rows.parquet")
        for name in (name for name in chosen if Case.named(name).model == model):
            found.append(run_case(name, weights, folder, asked))
            print(json.dumps(found[-1]), flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(["", *table(found), "", *comparisons(found)]))


if __name__ == "__main__":
    main()
