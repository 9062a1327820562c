"""One look at a model on the held-out rows: preferences for any data, scored answers where the truth is known."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.scenes import KINDS
from smolvlm_exp.evaluation.generate import generate_answers
from smolvlm_exp.evaluation.hallucination import Caption, chair, mentions, yes_no, yes_or_no
from smolvlm_exp.evaluation.images import image_use
from smolvlm_exp.evaluation.preference import Logps, answer_logps, preference_metrics
from smolvlm_exp.evaluation.statistics import Change, Ratio, compare, interval

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

SAMPLES = 12  # answers that are generated for the report where no truth is known


@dataclass(frozen=True)
class Evaluation:
    ratios: dict[str, Ratio]
    logps: Logps
    answers: list[str]  # to the first rows, or to all where truth is known

    @property
    def metrics(self) -> dict[str, float]:
        return {name: ratio.value for name, ratio in self.ratios.items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of each metric, at 95 %."""
        return {name: interval(ratio) for name, ratio in self.ratios.items()}

    def changes(self, before: "Evaluation") -> dict[str, Change]:
        """What became of the metrics that both evaluations of the same rows have."""
        return {
            name: compare(before.ratios[name], ratio) for name, ratio in self.ratios.items() if name in before.ratios
        }


def evaluate(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: "Dataset",
    batch_size: int,
    max_length: int | None = None,
    reference: Logps | None = None,
    beta: float = 1.0,
    temperature: float = 0.0,
    seed: int = 0,
) -> Evaluation:
    """Metrics as summary.json has them.

    Args:
        reference: what the base model's evaluation found; beta: DPO's.
        temperature: of generated answers, 0: greedy; seed: of theirs.
    """
    logps = answer_logps(model, processor, rows, batch_size, max_length)
    known = "truth" in rows.column_names
    asked = rows if known else rows.select(range(min(SAMPLES, len(rows))))
    answers = generate_answers(model, processor, list(asked), 4 * batch_size, temperature=temperature, seed=seed)
    ratios = preference_metrics(logps, reference, beta)
    if known:
        ratios |= truth_metrics(answers, [json.loads(truth) for truth in rows["truth"]])
    ratios |= image_use(model, processor, rows, batch_size, max_length, logps)
    return Evaluation(ratios, logps, answers)


def truth_metrics(answers: list[str], truths: list[dict[str, Any]]) -> dict[str, Ratio]:
    """Captions by CHAIR, yes/no questions by POPE's measures."""
    pairs = list(zip(answers, truths, strict=True))
    captions = [
        Caption(mentions(answer, KINDS), truth["objects"], len(answer.split()))
        for answer, truth in pairs
        if truth["kind"] == "caption"
    ]
    questions = [(yes_or_no(answer), truth["answer"]) for answer, truth in pairs if truth["kind"] == "yes_no"]
    return {**chair(captions), **yes_no([a for a, _ in questions], [t for _, t in questions])}


def hallucinated(answer: str, truth: str | None) -> list[str]:
    """The objects a caption names that are not there."""
    known = json.loads(truth) if truth else {}
    if known.get("kind") != "caption":
        return []
    return [word for word in mentions(answer, KINDS) if word not in known["objects"]]
