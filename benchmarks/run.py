"""Whole commands, from nothing to the report: `experiment=fast` against plain TRL as a person would script it.

    python -m benchmarks.run [--model smolvlm] [--rows 600] [--only alone,sweep,stock]
    python -m benchmarks.run --model tiny --rows 64 --tokens 16 --stock-seconds 20      a minute or two on a CPU

Random weights in the real shape, saved once and loaded by both from one folder. Ours runs by itself with nothing
cached, then as the first two jobs of a sweep (which keep features on the disk). Plain TRL is benchmarks/plain_trl.py.
Both tune the same modules on the same rows with the same settings, evaluate the held-out rows' loss every tenth of the
steps, and score before and after: log-probs of both answers, of 32 rows with a grey and a wrong image too, and
12 answers. Ours validates the rows, answers during training, saves checkpoints, and writes a report with checks and
intervals on top.
Prints tables for RESULTS.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import Finished, empty_folder, machine, make_rows, phase_table, run_command, run_smolvlm_exp
from benchmarks.setting import compose, empty_cache

TEST_FRACTION, SIZE = 0.08, (640, 480)


def save_model(name: str, folder: Path) -> Path:
    """conf/model/NAME.yaml's shape with random weights, and its processor, where `from_pretrained` can load them."""
    from smolvlm_exp.models.model import load_model, load_processor
    from smolvlm_exp.models.shape import EMBEDDED

    if name == "tiny":
        return EMBEDDED
    config = compose(f"model={name}", "model.weights=random", "quant=none").model
    load_model(config).save_pretrained(folder)
    load_processor(config).save_pretrained(folder)
    empty_cache()
    return folder


def ours(model: str, weights: Path, rows: Path, tokens: int, work: Path, parts: Sequence[str]) -> dict[str, Finished]:
    """The command by itself (`alone`), then as the first and the second job of a sweep (`sweep`)."""
    overrides = (
        "experiment=fast", f"model={model}", f"model.id={weights}", "data=files", f"data.folder={rows}",
        "data.train=train", "data.test=test", f"data.test_fraction={TEST_FRACTION}", f"task.max_new_tokens={tokens}",
        "trainer.max_steps=-1",  # model=tiny: 110
    )  # fmt: skip
    sweep = (*overrides, "trainer.cache_ram=0MiB")
    runs = {}
    if "alone" in parts:
        runs["by itself"] = run_smolvlm_exp(overrides, "run", work / "alone")
    if "sweep" in parts:
        for job in ("first", "second"):
            runs[f"{job} of a sweep"] = run_smolvlm_exp(sweep, job, work / "sweep")
    return runs


def stock(weights: Path, rows: Path, tokens: int, seconds: float, work: Path) -> list[dict]:
    """Plain TRL's phases; see benchmarks/plain_trl.py."""
    file = work / "plain_trl.json"
    arguments = (
        "-m", "benchmarks.plain_trl", "--model", str(weights), "--rows", str(rows), "--json", str(file),
        "--test-fraction", str(TEST_FRACTION), "--tokens", str(tokens), "--seconds", str(seconds),
    )  # fmt: skip
    run_command(arguments, work / "plain_trl.log", work / "plain_trl_cache")
    return json.loads(file.read_text(encoding="utf-8"))


def stock_table(phases: Sequence[dict]) -> list[str]:
    """Markdown: each phase's seconds, and from how much of it they are scaled."""
    lines = ["| plain TRL | seconds | timed |", "|---|---|---|"]
    for phase in phases:
        done, of = len(phase["times"]), phase["pieces"]
        timed = "all" if done == of else f"{done} of {of}, {sum(phase['times']):.1f} s; scaled"
        lines.append(f"| {phase['name']} | {phase['seconds']:.1f} | {timed} |")
    return [*lines, f"| **all** | **{total(phases):.0f}** | |"]


def total(phases: Sequence[dict]) -> float:
    return sum(phase["seconds"] for phase in phases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smolvlm", help="of conf/model")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--folder", type=Path, default=None, help="with pairs.jsonl and images; made where left out")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--only", default="alone,sweep,stock")
    parser.add_argument("--stock-seconds", type=float, default=240, help="for those phases of plain TRL that repeat")
    asked = parser.parse_args()
    work = empty_folder(Path("outputs/benchmark/run").resolve())
    rows, parts = asked.folder, asked.only.split(",")
    if rows is None:
        make_rows(rows := work / "rows", asked.rows, SIZE)
    count = sum(1 for _ in (rows / "pairs.jsonl").open(encoding="utf-8"))
    weights = save_model(asked.model, work / "model")
    print(f"{machine()}\nmodel={asked.model}, {count} pairs, {TEST_FRACTION:.0%} of them held out, "
          f"answers of {asked.tokens} tokens at most\n", flush=True)  # fmt: skip
    runs = ours(asked.model, weights, rows.resolve(), asked.tokens, work, parts)
    if runs:
        print("\n".join([*phase_table(runs), ""]), flush=True)
    if "stock" in parts:
        phases = stock(weights, rows.resolve(), asked.tokens, asked.stock_seconds, work)
        print("\n".join([*stock_table(phases), ""]))
        for name, run in runs.items():
            print(f"plain TRL takes {total(phases) / run.seconds:.1f} times as long as ours, {name}")


if __name__ == "__main__":
    main()
