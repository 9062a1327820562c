"""Held-out rows in the report: a card with the image, the question and the answers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolvlm_exp.reporting.html import embed, highlight

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Sample:
    """One held-out row, answered before and after."""

    image: "Image"
    question: str
    chosen: str
    rejected: str
    before: str  # the base model's greedy answer
    after: str  # the tuned model's
    hallucinated_before: list[str]  # words to mark, empty where the truth is unknown
    hallucinated_after: list[str]
    truth: str = ""  # in place of chosen and rejected, where there are none

    def card(self) -> dict[str, Any]:
        labels = [("Truth", self.truth)] if self.truth else [("Chosen", self.chosen), ("Rejected", self.rejected)]
        lines = [
            ("Before", highlight(self.before, self.hallucinated_before), "model"),
            ("After", highlight(self.after, self.hallucinated_after), "model"),
            *((name, text, "label") for name, text in labels),
        ]
        return {"image": embed(self.image), "question": self.question, "lines": lines}
