"""Rows -> one packed batch in which both answers of a pair share their prompt, image included.

Tokens form one line without padding, all prompts with their chosen answers first, then all rejected answers:

    [P1 C1 P2 C2 ... | p1 R1 p2 R2 ...]

`p` is a copy of the prompt's last token: what follows it is predicted twice, by C's side and by R's, and with a copy of
its own each side is an ordinary sequence. layers/attention.py lets [p R] see the prompt before it. The last token of an
answer predicts nothing and is left out. Rows without a rejected answer (supervised fine-tuning) have no second half.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

# prompt_ids (P,), chosen_ids (C,), rejected_ids (R,) or none at all, tiles (n, 3, S, S) or features; see dataset.py
Row = dict[str, Any]


def collate(rows: Sequence[Row], pad_token_id: int, image_token_id: int) -> dict[str, Any]:
    """One batch: TRL's own fields for its loss code, and `packed`, what forward.py computes on.

    Returns:
        `input_ids`, `attention_mask`, `completion_mask`: (2B, L) as TRL's collator lays them out, chosen rows first;
        `ref_chosen_logps`, `ref_rejected_logps`: (B,) where the rows have them;
        `packed`: see `pack`.
        Without rejected answers, as TRL's collator for supervised fine-tuning has it: (B, L), and `labels`, -100
        outside the answers, in place of `completion_mask`.
    """
    batch: dict[str, Any] = {**trl_layout(rows, pad_token_id), "packed": pack(rows, image_token_id)}
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
    """The packed line of T tokens and the indices into it.

    Returns:
        `ids`, `positions`: (1, T); `tokens`: T; `middle`: where the second half begins.
        `image_at`: (I,) where the features of the images go, in the order of `tiles`.
        `answer_at`: (N,) the positions whose next token is an answer's; `labels`: (N,) those tokens;
        `target`: (N,) their places in TRL's (2B, L - 1) layout, flattened.
        `cu_first`, `cu_second`: (B + 1,) int32, where each [P C] and each [p R] begins in its own half.
        `keys_at`: (K,) what [p R] attends to, [P before p, p R] after [...]; `cu_keys`: (B + 1,) int32.
        `max_first`, `max_second`, `max_keys`: lengths of the longest of each, as numbers.
        `tiles`: (n, 3, S, S) uint8, those of all rows; or `features`: (n, tokens, H), where the rows have them.
        Without rejected answers `cu_second` and `cu_keys` are (1,), and `keys_at` and the maxima are empty and 0.
    """
    prompts, chosen = ([row[f"{name}_ids"] for row in rows] for name in ("prompt", "chosen"))
    rejected = [row["rejected_ids"] for row in rows if "rejected_ids" in row]
    assert len(rejected) in (0, len(rows))
    assert all(map(len, [*prompts, *chosen, *rejected])), "a prompt or an answer without tokens"
    first = [len(p) + len(c) - 1 for p, c in zip(prompts, chosen, strict=True)]
    second = [len(r) for r in rejected]
    starts, middle = [0, *accumulate(first)], sum(first)
    seconds = [middle + s for s in (0, *accumulate(second))]
    width = max(len(p) + len(a) for answers in (chosen, rejected) for p, a in zip(prompts, answers, strict=False)) - 1
    answer_at, target, keys_at, positions = [], [], [], []
    for i, (p, c) in enumerate(zip(map(len, prompts), map(len, chosen), strict=True)):
        answer_at.append(torch.arange(starts[i] + p - 1, starts[i] + p - 1 + c))
        target.append(torch.arange(i * width + p - 1, i * width + p - 1 + c))
        positions.append(torch.arange(p + c - 1))
    for i, (p, r) in enumerate(zip(map(len, prompts), second, strict=False)):
        answer_at.append(torch.arange(seconds[i], seconds[i] + r))
        target.append(torch.arange((len(rows) + i) * width + p - 1, (len(rows) + i) * width + p - 1 + r))
        keys_at += [torch.arange(starts[i], starts[i] + p - 1), torch.arange(seconds[i], seconds[i] + r)]
        positions.append(torch.arange(p - 1, p - 1 + r))
    keys = [len(p) - 1 + r for p, r in zip(prompts, second, strict=False)]
    halves = (prompts, [c[:-1] for c in chosen]), ([p[-1:] for p in prompts], [r[:-1] for r in rejected])
    ids = torch.cat([part for left, right in halves for pair in zip(left, right, strict=False) for part in pair])
    images = "features" if "features" in rows[0] else "tiles"
    return {
        "ids": ids[None],
        "tokens": len(ids),
        "middle": middle,
        "positions": torch.cat(positions)[None],
        "image_at": (ids[:middle] == image_token_id).nonzero().flatten(),
        "answer_at": torch.cat(answer_at),
        "labels": torch.cat([*chosen, *rejected]),
        "target": torch.cat(target),
        "cu_first": cumulative(first),
        "cu_second": cumulative(second),
        "keys_at": torch.cat([torch.empty(0, dtype=torch.int64), *keys_at]),
        "cu_keys": cumulative(keys),
        "max_first": max(first),
        "max_second": max(second, default=0),
        "max_keys": max(keys, default=0),
        images: torch.cat([row[images] for row in rows]),
    }


def cumulative(lengths: Sequence[int]) -> torch.Tensor:
    """(B,) lengths -> (B + 1,) int32 offsets."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
