"""What the tests of rewards share: completions as TRL has them, and truths as the data has them."""

import json

from smolvlm_exp.data.vocabulary import Vocabulary

KINDS = Vocabulary({kind: kind for kind in ("star", "moon", "cross", "ring")}, once=True)  # as data=shapes has it


def said(*answers):
    return [[{"role": "assistant", "content": answer}] for answer in answers]


def known(*truths):
    return [None if truth is None else json.dumps(truth) for truth in truths]


def caption(*objects, **more):
    return {"kind": "caption", "objects": list(objects), **more}
