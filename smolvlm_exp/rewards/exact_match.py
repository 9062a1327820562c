"""Is the answer the right one, word for word?"""

from collections.abc import Sequence
from typing import Any

from smolvlm_exp.evaluation import exact_match as evaluation
from smolvlm_exp.rewards.completions import Conversation, Scores, of_kind, texts


def exact_match(completions: Sequence[Conversation], truth: Sequence[str | None], **columns: Any) -> Scores:
    """1 where the answer, normalised as VQA does, is one that the truth's `answer` accepts (kind `answer`), else 0."""
    return [
        None if known is None else float(evaluation.exact_match(text, known["answer"]))
        for text, known in zip(texts(completions), of_kind(truth, "answer"), strict=True)
    ]
