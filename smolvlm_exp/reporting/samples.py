"""Held-out rows in the report: a card with the picture, the question and the answers."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smolvlm_exp.reporting.html import SMALL_EDGE, empty, highlight, picture

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


@dataclass
class SampleHistory:
    """One held-out row, answered again and again while the model was tuned."""

    image: "Image"
    question: str
    answers: list[tuple[int, str, list[str]]]  # after that many steps; with words to mark


def sample_cards(samples: list[Sample]) -> str:
    if not samples:
        return empty("No samples were kept.")
    marked = any(s.hallucinated_before or s.hallucinated_after for s in samples)
    legend = '<p class="hint">Held-out rows, answered greedily.'
    legend += " <mark>Marked</mark> words name things that are not in the picture." if marked else ""
    return f"{legend}</p>{_cards(map(_card, samples), [s.image for s in samples])}"


def history_cards(courses: Sequence[SampleHistory]) -> str:
    cards = []
    for course in courses:
        lines = [(f"Step {step}", highlight(text, marked), "model") for step, text, marked in course.answers]
        cards.append(_article(course.image, course.question, lines))
    return _cards(cards, [course.image for course in courses])


def _cards(cards: Iterable[str], images: "list[Image]") -> str:
    size = "small" if all(max(image.size) <= SMALL_EDGE for image in images) else ""
    return f'<div class="cards {size}">{"".join(cards)}</div>'


def _card(s: Sample) -> str:
    rows = [
        ("Before", highlight(s.before, s.hallucinated_before), "model"),
        ("After", highlight(s.after, s.hallucinated_after), "model"),
        ("Chosen", html.escape(s.chosen), "label"),
        ("Rejected", html.escape(s.rejected), "label"),
    ]
    return _article(s.image, s.question, [*rows[:2], ("Truth", html.escape(s.truth), "label")] if s.truth else rows)


def _article(image: "Image", question: str, rows: list[tuple[str, str, str]]) -> str:
    lines = "".join(
        f'<div class="{kind}"><dt>{name}</dt><dd>{text if text.strip() else "(empty)"}</dd></div>'
        for name, text, kind in rows
    )
    return f'<article class="card">{picture(image)}<h3>{html.escape(question)}</h3><dl>{lines}</dl></article>'
