"""Rows -> one packed batch in which all answers to a prompt share it, image included.

Tokens form one line without padding, all prompts with their chosen answers first, then all rejected answers:

    [P1 C1 P2 C2 ... | p1 R1 p2 R2 ...]

`p` is a copy of the prompt's last token: what follows it is predicted twice, by C's side and by R's, and with a copy of
its own each side is an ordinary sequence. layers/attention.py lets [p R] see the prompt before it. The last token of an
answer predicts nothing and is left out. Rows without a rejected answer (supervised fine-tuning) have no second half;
where a prompt has a whole group of answers (GRPO), all but the first are in the second half, each behind its own `p`.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

# prompt_ids (P,), chosen_ids (C,), rejected_ids (R,) or none at all, tiles (n, 3, S, S) or features; see dataset.py
Row = dict[str, Any]


def collate(rows: Sequence[Row], pad_token_id: int, image_token_id: int, few_lengths: bool = False) -> dict[str, Any]:
    """One batch: TRL's own fields for its loss code, and `packed`, what forward.py computes on.

    Args:
        few_lengths: see `padded`.

    Returns:
        `input_ids`, `attention_mask`, `completion_mask`: (2B, L) as TRL's collator lays them out, chosen rows first;
        `ref_chosen_logps`, `ref_rejected_logps`: (B,) where the rows have them;
        `packed`: see `pack`.
        Without rejected answers, as TRL's collator for supervised fine-tuning has it: (B, L), and `labels`, -100
        outside the answers, in place of `completion_mask`.
    """
    packed = pack(rows, image_token_id)
    batch: dict[str, Any] = {**trl_layout(rows, pad_token_id), "packed": padded(packed) if few_lengths else packed}
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        if name in rows[0]:
            batch[name] = torch.stack([row[name] for row in rows])
    return batch


def trl_layout(rows: Sequence[Row], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`collate`'s first fields, each (2B, L): every answer behind its prompt, padded on the right."""
    sides = ("chosen_ids", "rejected_ids") if "rejected_ids" in rows[0] else ("chosen_ids",)
    pairs = [(row["prompt_ids"], row[side]) for side in sides for row in rows]
    answers = [torch.cat((torch.zeros_like(prompt), torch.ones_like(answer))) for prompt, answer in pairs]
    input_ids = pad_sequence([torch.cat(pair) for pair in pairs], batch_first=True, padding_value=pad_token_id)
    attention_mask = pad_sequence([torch.ones_like(answer) for answer in answers], batch_first=True)
    completion_mask = pad_sequence(answers, batch_first=True)
    fields = {"input_ids": input_ids, "attention_mask": attention_mask}
    if len(sides) == 1:
        return {**fields, "labels": input_ids.masked_fill(completion_mask == 0, -100)}
    return {**fields, "completion_mask": completion_mask}


def pack(rows: Sequence[Row], image_token_id: int) -> dict[str, Any]:
    """`pack_answers` of pairs, with `target` for TRL's (2B, L - 1) layout, chosen rows first; and their images.

    Returns:
        `tiles`: (n, 3, S, S) uint8, those of all rows; or `features`: (n, tokens, H), where the rows have them.
        Without rejected answers `cu_second` and `cu_keys` are (1,), and `keys_at` and the maxima are empty and 0.
    """
    prompts = [row["prompt_ids"] for row in rows]
    answers = [[row[side] for side in ("chosen_ids", "rejected_ids") if side in row] for row in rows]
    assert len(set(map(len, answers))) == 1
    width = max(len(p) + len(answer) for p, own in zip(prompts, answers, strict=True) for answer in own) - 1
    first = [[(side * len(rows) + i) * width + len(p) - 1 for side in (0, 1)] for i, p in enumerate(prompts)]
    images = "features" if "features" in rows[0] else "tiles"
    return {
        **pack_answers(prompts, answers, [own[: len(answers[0])] for own in first], image_token_id),
        images: torch.cat([row[images] for row in rows]),
    }


def pack_answers(
    prompts: Sequence[torch.Tensor],
    answers: Sequence[Sequence[torch.Tensor]],
    target: Sequence[Sequence[int]],
    image_token_id: int,
) -> dict[str, Any]:
    """The packed line of T tokens and the indices into it; B prompts, N answers' tokens, S answers but the first.

    Args:
        prompts: (P,) int64 each; answers: one or more of each prompt, none of them empty.
        target: where the log-probability of each answer's first token goes in a flat table, the others behind it.

    Returns:
        `ids`, `positions`: (1, T); `tokens`: T; `middle`: where the second half begins.
        `image_at`: (I,) where the features of the images go, in the prompts' order.
        `answer_at`: (N,) the positions whose next token is an answer's; `labels`: (N,) those tokens;
        `target`: (N,) their places in the table.
        `cu_first`: (B + 1,), `cu_second`: (S + 1,) int32, where each [P C] and each [p R] begins in its own half.
        `keys_at`: (K,) what [p R] attends to, [P before p, p R] after [...]; `cu_keys`: (S + 1,) int32.
        `max_first`, `max_second`, `max_keys`: lengths of the longest of each, as numbers.
        `copies`: how often a token of a prompt occurs in `keys_at`, at most.
    """
    assert all(map(len, [*prompts, *answers, *(answer for own in answers for answer in own)])), (
        "a prompt or an answer without tokens"
    )
    firsts = [own[0] for own in answers]
    others = [(i, answer, place) for i, own in enumerate(answers)
              for answer, place in zip(own[1:], target[i][1:], strict=True)]  # fmt: skip
    first = [len(p) + len(c) - 1 for p, c in zip(prompts, firsts, strict=True)]
    second = [len(answer) for _, answer, _ in others]
    starts, middle = [0, *accumulate(first)], sum(first)
    seconds = [middle + s for s in (0, *accumulate(second))]
    answer_at, places, keys_at, positions = [], [], [], []
    for i, (p, c) in enumerate(zip(map(len, prompts), map(len, firsts), strict=True)):
        answer_at.append(torch.arange(starts[i] + p - 1, starts[i] + p - 1 + c))
        places.append(torch.arange(target[i][0], target[i][0] + c))
        positions.append(torch.arange(p + c - 1))
    for begin, (i, answer, place) in zip(seconds, others, strict=False):
        p, r = len(prompts[i]), len(answer)
        answer_at.append(torch.arange(begin, begin + r))
        places.append(torch.arange(place, place + r))
        keys_at += [torch.arange(starts[i], starts[i] + p - 1), torch.arange(begin, begin + r)]
        positions.append(torch.arange(p - 1, p - 1 + r))
    keys = [len(prompts[i]) - 1 + r for (i, _, _), r in zip(others, second, strict=True)]
    line = [part for p, c in zip(prompts, firsts, strict=True) for part in (p, c[:-1])]
    line += [part for i, answer, _ in others for part in (prompts[i][-1:], answer[:-1])]
    ids = torch.cat(line)
    return {
        "ids": ids[None],
        "tokens": len(ids),
        "middle": middle,
        "positions": torch.cat(positions)[None],
        "image_at": (ids[:middle] == image_token_id).nonzero().flatten(),
        "answer_at": torch.cat(answer_at),
        "labels": torch.cat([*firsts, *(answer for _, answer, _ in others)]),
        "target": torch.cat(places),
        "cu_first": cumulative(first),
        "cu_second": cumulative(second),
        "keys_at": torch.cat([torch.empty(0, dtype=torch.int64), *keys_at]),
        "cu_keys": cumulative(keys),
        "max_first": max(first),
        "max_second": max(second, default=0),
        "max_keys": max(keys, default=0),
        "copies": max(1, *(len(own) - 1 for own in answers)),
    }


def padded(packed: dict[str, Any]) -> dict[str, Any]:
    """The same answers on a line of one of few lengths, at most a sixteenth longer, so that CUDA graphs are used again.

    What the line has to spare is one more sequence of the second half, which nobody looks at.
    """
    tokens = packed["tokens"]
    step = max(64, 2 ** (tokens.bit_length() - 5))
    spare = step - tokens % step
    nothing, end = packed["ids"].new_zeros(1, spare), torch.tensor([spare], dtype=torch.int32)
    return {
        **packed,
        "ids": torch.cat((packed["ids"], nothing), dim=1),
        "positions": torch.cat((packed["positions"], nothing), dim=1),
        "tokens": tokens + spare,
        "keys_at": torch.cat((packed["keys_at"], torch.arange(tokens, tokens + spare))),
        "cu_second": torch.cat((packed["cu_second"], packed["cu_second"][-1:] + end)),
        "cu_keys": torch.cat((packed["cu_keys"], packed["cu_keys"][-1:] + end)),
        "max_second": max(packed["max_second"], spare),
        "max_keys": max(packed["max_keys"], spare),
    }


def cumulative(lengths: Sequence[int]) -> torch.Tensor:
    """(B,) lengths -> (B + 1,) int32 offsets."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
