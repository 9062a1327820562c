"""A model evaluated on the held-out rows: preferences for any data, scored answers where the truth is known."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.vocabulary import Words
from smolvlm_exp.evaluation.generate import generate_answers
from smolvlm_exp.evaluation.hallucination import chair, f1, read_caption, yes_no, yes_or_no
from smolvlm_exp.evaluation.preference import Logps, answer_logps, image_reliance_metrics, preference_metrics
from smolvlm_exp.evaluation.statistics import Ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from smolvlm_exp.data.preferences import Preferences

SAMPLES = 12  # answers that are generated for the report where no truth is known


@dataclass(frozen=True)
class Evaluation:
    ratios: dict[str, Ratio]
    logps: Logps | None  # None where rows have no pair of answers
    answers: list[str]  # to the first rows, or to all where the truth is known

    @property
    def metrics(self) -> dict[str, float]:
        return {name: ratio.value for name, ratio in self.ratios.items()}


def evaluate(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    preferences: "Preferences",
    batch_size: int,
    max_length: int | None = None,
    reference: Logps | None = None,
    beta: float = 1.0,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 256,
) -> Evaluation:
    """Metrics as summary.json has them.

    Args:
        preferences: whose held-out rows are used.
        reference: the base model's log-probs, for the implicit reward; beta: DPO's.
        temperature, seed, max_new_tokens: of generated answers; a temperature of 0 is greedy.
    """
    rows = preferences.test
    known = "truth" in rows.column_names
    prompted = rows if known else rows.select(range(min(SAMPLES, len(rows))))
    logps, ratios = None, dict[str, Ratio]()
    if "chosen" in rows.column_names:
        logps = answer_logps(model, processor, rows, batch_size, max_length)
        ratios = preference_metrics(logps, reference, beta)
    answers = generate_answers(model, processor, list(prompted), 4 * batch_size, max_new_tokens, temperature, seed)
    if known:
        ratios |= truth_metrics(answers, [json.loads(truth) for truth in rows["truth"]], preferences.words)
    if logps:
        ratios |= image_reliance_metrics(model, processor, rows, batch_size, max_length)
    return Evaluation(ratios, logps, answers)


def truth_metrics(answers: list[str], truths: list[dict[str, Any]], words: Words | None) -> dict[str, Ratio]:
    """Captions by CHAIR, yes/no questions by POPE's measures and, where no is the positive, by its F1 too."""
    pairs = list(zip(answers, truths, strict=True))
    captions = [read_caption(answer, truth, words) for answer, truth in pairs if words and truth["kind"] == "caption"]
    questions = [(yes_or_no(answer), truth) for answer, truth in pairs if truth["kind"] == "yes_no"]
    predicted, true = [predicted for predicted, _ in questions], [truth["answer"] for _, truth in questions]
    metrics = {**chair(captions), **yes_no(predicted, true)}
    if any(truth.get("positive") == "no" for _, truth in questions):
        metrics["no_f1"] = f1(predicted, true, "no")
    return metrics


def hallucinated(answer: str, truth: str | None, words: Words | None) -> list[str]:
    """The words of a caption that name objects which are not there."""
    known = json.loads(truth) if truth else {}
    if known.get("kind") != "caption" or words is None:
        return []
    return [word for word, name in words(answer, known) if name is not None and name not in known["objects"]]
