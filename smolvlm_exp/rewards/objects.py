"""Does a caption name what is in the image, and nothing else?"""

from collections.abc import Sequence
from typing import Any

from smolvlm_exp.data.vocabulary import Words
from smolvlm_exp.evaluation.hallucination import Caption, read_caption
from smolvlm_exp.rewards.completions import Conversation, Scores, of_kind, texts


def objects(completions: Sequence[Conversation], truth: Sequence[str | None], words: Words, **columns: Any) -> Scores:
    """2 * recall - (1 if an object is named that is not in the image, else 0), for truths of the kind `caption`.

    Recall is the share of the image's objects that are named, as CHAIR reads them (arXiv 1809.02156). Precision in its
    place would be highest for a caption that says next to nothing.
    """
    return [
        None if known is None else recall_less_invention(read_caption(text, known, words))
        for text, known in zip(texts(completions), of_kind(truth, "caption"), strict=True)
    ]


def recall_less_invention(caption: Caption) -> float:
    """From -1 (nothing right, something invented) to 2; an image without objects has a recall of 1."""
    named, present = set(caption.mentions), set(caption.objects)
    recall = len(named & present) / len(present) if present else 1.0
    return 2 * recall - bool(named - present)
