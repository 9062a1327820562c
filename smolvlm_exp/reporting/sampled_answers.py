"""What a model answered while it was trained on its own answers, for the report and the tracker."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from smolvlm_exp.data.truth import image_text
from smolvlm_exp.reporting.html import embed
from smolvlm_exp.utils.formatting import humanize, number

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

T = TypeVar("T")
Events = Sequence[dict[str, Any]]  # of COMPLETIONS, by step

COMPLETIONS = "completions.jsonl"  # in the run folder, per line: {"step", "row", "question", "answers": [...]}
SHOWN = 6  # groups in the report
TABLE_ROWS = 10_000  # of a W&B table: it keeps no more


@dataclass(frozen=True)
class SampledGroup:
    """The answers to a training row's prompt at one step."""

    image: "Image"
    alt: str  # what is in the image, in words
    question: str
    step: int
    answers: list[dict[str, Any]]  # {"text", "reward", "rewards": {name: reward}}, the best first

    def card(self) -> dict[str, Any]:
        lines = [(reward_label(answer), answer["text"], "model") for answer in self.answers]
        question = f"Step {self.step}: {self.question}"
        return {"image": embed(self.image), "alt": self.alt, "question": question, "lines": lines}


def reward_label(answer: dict[str, Any]) -> str:
    """`Reward 1.8: objects 2, repetition -1`: the weighted sum, and what each reward says."""
    parts = ", ".join(f"{humanize(name)} {number(value)}" for name, value in answer["rewards"].items())
    return f"Reward {number(answer['reward'])}{f': {parts}' if parts else ''}"


def sampled_groups(rows: "Dataset", events: Events) -> list[SampledGroup]:
    """A few groups from a run's first step to its last; `rows`: of training."""
    shown = [(rows[event["row"]], event) for event in spread(events, SHOWN)]
    return [
        SampledGroup(
            row["images"][0],
            image_text(row.get("truth"), event["question"]),
            event["question"],
            event["step"],
            best_first(event["answers"]),
        )
        for row, event in shown
    ]


def best_first(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(answers, key=lambda answer: -answer["reward"])


def completions_table(events: Events) -> tuple[list[str | int], list[list[Any]]]:
    """Columns and rows: step, question, answer, reward, and each reward, None where it says nothing."""
    answers = [answer for event in events for answer in event["answers"]]
    names = list(dict.fromkeys(name for answer in answers for name in answer["rewards"]))
    groups = spread(events, TABLE_ROWS * len(events) // max(len(answers), 1))
    rows = [
        [event["step"], event["question"], answer["text"], answer["reward"], *map(answer["rewards"].get, names)]
        for event in groups
        for answer in event["answers"]
    ]
    return ["step", "question", "answer", "reward", *(f"reward/{name}" for name in names)], rows


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
