"""How task=mine is shown: report.html with the distribution of scores, pairs, and rows that teach nothing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.truth import image_text, truth_text
from smolvlm_exp.data.vocabulary import Words
from smolvlm_exp.evaluation.truth_metrics import hallucinated
from smolvlm_exp.reporting.charts import Points, bar_chart, line_chart
from smolvlm_exp.reporting.html import embed, highlight, render
from smolvlm_exp.reporting.report import phase_facts, reproduce_commands
from smolvlm_exp.rewards.pairs import ScoredAnswer
from smolvlm_exp.utils.formatting import duration, humanize, number, percent

BINS = 24  # of the distribution of scores


@dataclass(frozen=True)
class Example:
    """A row with its answers."""

    row: dict[str, Any]
    answers: Sequence[ScoredAnswer]
    pairs: Sequence[tuple[int, int]]
    reason: str  # why it has no pairs; empty where it has
    words: Words | None

    def card(self) -> dict[str, Any]:
        shown = [(f"{side} {n}", self.answers[i]) for n, own in enumerate(self.pairs, 1) for side, i in named(own)]
        if not shown:
            counts = Counter(answer.text for answer in self.answers)
            first = {answer.text: answer for answer in self.answers}
            shown = [(f"{counts[text]} of {len(self.answers)}", first[text]) for text, _ in counts.most_common(3)]
        lines = [(f"{name}, {score_text(answer)}", self.marked(answer.text), "model") for name, answer in shown]
        reason = [("No pair", humanize(self.reason), "label")] if self.reason else []
        truth = ("Truth", truth_text(self.row["truth"]), "label")
        question = text_of(self.row["prompt"])
        alt = image_text(self.row["truth"], question)
        lines += [*reason, truth]
        return {"image": embed(self.row["images"][0]), "alt": alt, "question": question, "lines": lines}

    def marked(self, text: str) -> str:
        return highlight(text, hallucinated(text, self.row["truth"], self.words))


def named(pair: tuple[int, int]) -> list[tuple[str, int]]:
    return list(zip(("Chosen", "Rejected"), pair, strict=True))


def score_text(answer: ScoredAnswer) -> str:
    score = "no score" if answer.score is None else f"score {number(round(answer.score, 3))}"
    return score if answer.ended else f"{score}, cut"


def mining_page(
    folder: Path,
    summary: dict[str, Any],
    config: dict[str, Any],
    scores: Mapping[str, Sequence[float]],
    paired: Sequence[Example],
    unpaired: Sequence[Example],
) -> str:
    """
    Args:
        summary: what summary.json holds.
        scores: of all answers, of the chosen and of the rejected ones.
        paired, unpaired: rows to show.
    """
    rows, nothing = summary["rows"], {k: n for k, n in summary["taught_nothing"].items() if n}
    outcome = {"pairs": summary["rows_with_pairs"], **nothing}
    shares = {humanize(name): count / rows for name, count in outcome.items()}
    return render(
        "mining.html.jinja",
        heading=config.get("name") or "/".join(folder.absolute().parts[-2:]),
        lead=f"{summary['pairs']:,} pairs from {summary['rows_with_pairs']:,} of {rows:,} rows; "
        f"{percent(1 - shares['pairs'])} of the rows teach nothing.",
        status=summary["status"],
        about={**summary["settings"], "seed": summary["seed"], "time": duration(summary["seconds"])}.items(),
        charts=[
            line_chart(distribution(scores), "Scores", x_label="score", show=percent, zero=True),
            bar_chart(shares, "Rows"),
        ],
        facts={
            "answers": f"{summary['answers']:,}", "cut": f"{summary['cut']:,}",
            **{humanize(name): value for name, value in {**summary["reward"], **summary["rewards"]}.items()},
        }.items(),
        paired=[example.card() for example in paired],
        unpaired=[example.card() for example in unpaired],
        phases=phase_facts(summary["seconds_by_phase"]),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100),
        versions=summary["versions"],
        commands=reproduce_commands(folder, "done"),
    )  # fmt: skip


def distribution(scores: Mapping[str, Sequence[float]]) -> dict[str, Points]:
    """The share of each side's answers in equal bins from the lowest score to the highest, by the bins' middles."""
    every = [score for side in scores.values() for score in side]
    low, high = min(every, default=0.0), max(every, default=0.0)
    width = (high - low) / BINS or 1.0
    points: dict[str, Points] = {}
    for side, own in scores.items():
        counts = Counter(min(int((score - low) / width), BINS - 1) for score in own)
        points[side] = [(low + (i + 0.5) * width, counts[i] / len(own)) for i in range(BINS)] if own else []
    return points
