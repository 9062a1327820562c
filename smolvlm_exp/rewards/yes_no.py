"""Is a yes/no question answered right? By the answer's first word, as POPE's metrics read it."""

from collections.abc import Sequence
from typing import Any

from smolvlm_exp.evaluation.hallucination import yes_or_no
from smolvlm_exp.rewards.completions import Conversation, Scores, of_kind, texts


def yes_no(completions: Sequence[Conversation], truth: Sequence[str | None], **columns: Any) -> Scores:
    """1 where the first word is the right one of yes and no, else 0, also where it is neither; kind `yes_no`."""
    return [
        None if known is None else float(yes_or_no(text) == known["answer"])
        for text, known in zip(texts(completions), of_kind(truth, "yes_no"), strict=True)
    ]
