"""What mining leaves in its folder: pairs.jsonl, images/, summary.json, report.html."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.loading import undecoded
from smolvlm_exp.data.preferences import Preferences
from smolvlm_exp.data.sources.files import PAIRS
from smolvlm_exp.data.truth import read_truth
from smolvlm_exp.reporting.mining_page import Example, mining_page
from smolvlm_exp.reporting.results import wide_console
from smolvlm_exp.rewards.pairs import ScoredAnswer, without_pairs
from smolvlm_exp.runs.find import choices
from smolvlm_exp.tasks.provenance import provenance
from smolvlm_exp.utils.errors import isolated
from smolvlm_exp.utils.files import atomic_file, write_json, write_text
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.phases import seconds_by_phase
from smolvlm_exp.utils.versions import versions

REASONS = ("all_right", "all_wrong", "no_margin", "unscored")
IMAGES = "images"
EXAMPLES = 12  # rows in the report with pairs, and as many without


@dataclass(frozen=True)
class Mined:
    preferences: Preferences  # whose training rows were answered
    answers: list[list[ScoredAnswer]]  # of each row
    pairs: list[list[tuple[int, int]]]  # of each row: places of chosen and rejected in its answers

    @cached_property
    def reasons(self) -> list[str]:
        """Why each row has no pairs; empty where it has some."""
        kinds = [read_truth(truth).get("kind", "") for truth in self.preferences.train["truth"][:]]
        highest: dict[str, float] = {}
        for kind, own in zip(kinds, self.answers, strict=True):
            scores = [answer.score for answer in own if answer.eligible and answer.score is not None]
            highest[kind] = max([*scores, highest.get(kind, -float("inf"))])
        rows = zip(kinds, self.answers, self.pairs, strict=True)
        return ["" if pairs else without_pairs(own, highest[kind]) for kind, own, pairs in rows]

    def without_pairs(self) -> dict[str, int]:
        """How many rows have none, by the reason."""
        counts = Counter(self.reasons)
        return {reason: counts[reason] for reason in REASONS}

    def sides(self) -> Iterator[tuple[int, ScoredAnswer, ScoredAnswer]]:
        """Each pair: its row's number, the chosen and the rejected answer."""
        for i, (answers, pairs) in enumerate(zip(self.answers, self.pairs, strict=True)):
            yield from ((i, answers[chosen], answers[rejected]) for chosen, rejected in pairs)


def write_mined(config: Config, folder: Path, mined: Mined) -> dict[str, Any]:
    """Write everything and print what came of it; returns the content of summary.json."""
    write_pairs(config, folder, mined)
    summary = summarize_mined(config, folder, mined)
    with isolated("report.html"):
        shown = examples(mined, True), examples(mined)
        page = mining_page(folder, summary, asdict(config), scores_by_side(mined), *shown)
        write_text(folder / "report.html", page)
    write_json(folder / "summary.json", summary)  # last: who reads `done` there finds all the rest
    print_mined(summary)
    print(f"{relative_to_cwd(folder)}/report.html")
    return summary


def write_pairs(config: Config, folder: Path, mined: Mined) -> None:
    """pairs.jsonl, complete or not there, and the images that it names."""
    rows, images = mined.preferences.train, folder / IMAGES
    images.mkdir(exist_ok=True)
    numbers = [i for i, pairs in enumerate(mined.pairs) if pairs]
    known = undecoded(rows.select(numbers), ["images", "image_sha256", "prompt", "truth"])
    given = dict(zip(numbers, (portable_row(row, images) for row in known), strict=True))
    adapter = config.model.adapter and str(relative_to_cwd(Path(config.model.adapter)))
    source = {"model": config.model.id, "adapter": adapter, "seed": config.seed}
    with atomic_file(folder / PAIRS) as part, part.open("w", encoding="utf-8") as file:
        for i, chosen, rejected in mined.sides():
            scores = {"chosen_score": chosen.score, "rejected_score": rejected.score}
            line = {**given[i], "chosen": chosen.text, "rejected": rejected.text, **scores, **source}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def portable_row(row: dict[str, Any], images: Path) -> dict[str, Any]:
    """A row's images as files in `images`, named by their hash; its prompt and truth."""
    names = []
    for image, digest in zip(row["images"], row["image_sha256"], strict=True):
        data = image["bytes"]  # PNG or JPEG: data/images.py
        suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
        path = images / f"{digest.hex()[:32]}.{suffix}"
        if not path.exists():
            with atomic_file(path) as part:
                part.write_bytes(data)
        names.append(f"{images.name}/{path.name}")
    return {"images": names, "prompt": row["prompt"], "truth": read_truth(row["truth"]) or None}


def summarize_mined(config: Config, folder: Path, mined: Mined) -> dict[str, Any]:
    answers = [answer for own in mined.answers for answer in own]
    sides = scores_by_side(mined)
    rewards = {name: [answer.rewards[name] for answer in answers] for name in answers[0].rewards}
    phases = seconds_by_phase()
    return {
        "status": "done",
        "seed": config.seed,
        "settings": choices(folder),
        "sources": {name: asdict(source) for name, source in provenance(config).items()},
        "data": mined.preferences.report,
        "rows": len(mined.answers),
        "answers": len(answers),
        "cut": sum(not answer.ended for answer in answers),  # at task.max_new_tokens
        "pairs": sum(map(len, mined.pairs)),
        "rows_with_pairs": sum(map(bool, mined.pairs)),
        "taught_nothing": mined.without_pairs(),
        "reward": {f"{side}_mean": fmean(scores) for side, scores in sides.items() if scores},
        "rewards": {
            name: fmean(known) for name, own in rewards.items() if (known := [s for s in own if s is not None])
        },
        "seconds": sum(phases.values()),
        "seconds_by_phase": phases,
        "versions": versions(),
    }


def scores_by_side(mined: Mined) -> dict[str, list[float]]:
    """The scores of all answers, of those that are chosen, and of those that are rejected; once for each pair."""
    sides = list(mined.sides())
    listed: dict[str, Sequence[ScoredAnswer]] = {
        "all": [answer for own in mined.answers for answer in own],
        "chosen": [chosen for _, chosen, _ in sides],
        "rejected": [rejected for *_, rejected in sides],
    }
    return {side: [answer.score for answer in answers if answer.score is not None] for side, answers in listed.items()}


def examples(mined: Mined, paired: bool = False) -> list[Example]:
    """Rows for the report, from the beginning to the end of the data: with pairs, or without."""
    numbers = [i for i, pairs in enumerate(mined.pairs) if bool(pairs) == paired]
    step = max(len(numbers) // EXAMPLES, 1)
    rows, words = mined.preferences.train, mined.preferences.words
    return [
        Example(rows[i], mined.answers[i], mined.pairs[i], mined.reasons[i], words) for i in numbers[::step][:EXAMPLES]
    ]


def print_mined(summary: dict[str, Any]) -> None:
    table = Table("mined", "")
    counts = {name: summary[name] for name in ("rows", "answers", "pairs", "rows_with_pairs")}
    for name, count in {**counts, **{f"taught nothing: {k}": n for k, n in summary["taught_nothing"].items()}}.items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    for name, value in {**summary["reward"], **summary["rewards"]}.items():
        table.add_row(name.replace("_", " "), f"{value:.3f}")
    wide_console().print(table)
