"""Answers scored against what is known to be in their images (data/truth.py)."""

from smolvlm_exp.data.truth import read_truth
from smolvlm_exp.data.vocabulary import Truth, Words
from smolvlm_exp.evaluation.exact_match import answer_accuracy
from smolvlm_exp.evaluation.hallucination import (
    attributes_in,
    chair,
    count_in,
    description_counts,
    f1,
    read_caption,
    repeats,
    yes_no,
    yes_or_no,
)
from smolvlm_exp.evaluation.statistics import Ratio, mean, ratio


def truth_metrics(answers: list[str], truths: list[str | None], words: Words | None) -> dict[str, Ratio]:
    """Captions by `caption_metrics`, where `words` reads objects out of them; yes/no questions by POPE's measures and,
    where no is the positive, by its F1 too; other questions by exact match."""
    pairs = [(answer, read_truth(truth)) for answer, truth in zip(answers, truths, strict=True) if truth]
    captions = [(answer, truth) for answer, truth in pairs if truth["kind"] == "caption"]
    questions = [(yes_or_no(answer), truth) for answer, truth in pairs if truth["kind"] == "yes_no"]
    others = [(answer, truth["answer"]) for answer, truth in pairs if truth["kind"] in ("answer", "number")]
    predicted, true = [predicted for predicted, _ in questions], [truth["answer"] for _, truth in questions]
    metrics = {**(caption_metrics(captions, words) if words else {}), **yes_no(predicted, true)}
    if any(truth.get("positive") == "no" for _, truth in questions):
        metrics["no_f1"] = f1(predicted, true, "no")
    return {**metrics, **answer_accuracy([answer for answer, _ in others], [accepted for _, accepted in others])}


def caption_metrics(captions: list[tuple[str, Truth]], words: Words) -> dict[str, Ratio]:
    """CHAIR's; `repeat_rate`; `attribute_accuracy` and `count_accuracy`, where the objects are known in full."""
    if not captions:
        return {}
    metrics = chair([read_caption(text, truth, words) for text, truth in captions])
    if any("phrases" in truth for _, truth in captions):
        for name, claims in (("attribute_accuracy", attributes_in), ("count_accuracy", count_in)):
            counts = [description_counts(text, truth, words, claims) for text, truth in captions]
            right, named = zip(*counts, strict=True)
            metrics[name] = ratio(right, named)
    return {**metrics, "repeat_rate": mean([repeats(text, truth, words) > 0 for text, truth in captions])}


def faults(answer: str, truth: str | None, words: Words | None) -> float | None:
    """How much is wrong with an answer; None where nothing is known, or nobody can tell.

    A caption has one fault for each object that is not there, is left out, is named again, or has a wrong colour or
    size, or a wrong number; any other answer is right (0) or wrong (1).
    """
    known = read_truth(truth)
    kind = known.get("kind")
    if kind == "caption" and words:
        caption = read_caption(answer, known, words)
        counts = [description_counts(answer, known, words, claims) for claims in (attributes_in, count_in)]
        absent = sum(name not in caption.objects for name in caption.mentions)
        left_out = len(set(caption.objects) - set(caption.mentions))
        return absent + left_out + repeats(answer, known, words) + sum(named - right for right, named in counts)
    if kind in ("caption", "reference", None):
        return None
    return 1.0 - next(iter(truth_metrics([answer], [truth], words).values())).value


def hallucinated(answer: str, truth: str | None, words: Words | None) -> list[str]:
    """The words of a caption that name objects which are not there."""
    known = read_truth(truth)
    if known.get("kind") != "caption" or words is None:
        return []
    return [word for word, name in words(answer, known) if name is not None and name not in known["objects"]]
