"""The packed layout on rows small enough to write down."""

import pytest
import torch

from smolvlm_exp.engine.inputs.packing import collate, pack, pack_answers, padded
from smolvlm_exp.engine.layers.layout import Layout
from tests.engine.stock import IMAGE, PAD


def row(prompt, chosen, rejected, tiles=0):
    ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    images = torch.zeros(tiles, 3, 4, 4, dtype=torch.uint8)
    return {**{name: torch.tensor(values) for name, values in ids.items()}, "tiles": images}


ROWS = [row([1, IMAGE, IMAGE, 11], [21, 22], [31, 32, 33], tiles=1), row([1, 12], [41], [51], tiles=0)]


def test_the_line_by_hand():
    packed = pack(ROWS, IMAGE)
    #                                  P1                C1     P2     (C2 has one token: it predicts nothing)
    assert packed["ids"].tolist() == [[1, IMAGE, IMAGE, 11, 21, 1, 12, 11, 31, 32, 12]]
    assert packed["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 3, 4, 5, 1]]
    assert packed["tokens"] == 11
    assert packed["middle"] == 7
    assert packed["image_at"].tolist() == [1, 2]
    assert packed["answer_at"].tolist() == [3, 4, 6, 7, 8, 9, 10]
    assert packed["labels"].tolist() == [21, 22, 41, 31, 32, 33, 51]
    assert packed["cu_first"].tolist() == [0, 5, 7]
    assert packed["cu_second"].tolist() == [0, 3, 4]
    assert packed["keys_at"].tolist() == [0, 1, 2, 7, 8, 9, 5, 10]
    assert packed["cu_keys"].tolist() == [0, 6, 8]
    assert (packed["max_first"], packed["max_second"], packed["max_keys"]) == (5, 3, 6)
    assert packed["cu_first"].dtype == packed["cu_keys"].dtype == torch.int32
    assert packed["tiles"].shape == (1, 3, 4, 4)


def test_a_group_of_answers_by_hand():
    prompts, answers = [torch.tensor([1, 11, 12])], [[torch.tensor(a) for a in ([21, 22], [31], [41, 42, 43])]]
    packed = pack_answers(prompts, answers, [[0, 4, 8]], IMAGE)
    #                                   P         A1  p   (A2: one token)  p   A3
    assert packed["ids"].tolist() == [[1, 11, 12, 21, 12, 12, 41, 42]]
    assert packed["positions"].tolist() == [[0, 1, 2, 3, 2, 2, 3, 4]]
    assert packed["middle"] == 4
    assert packed["answer_at"].tolist() == [2, 3, 4, 5, 6, 7]
    assert packed["labels"].tolist() == [21, 22, 31, 41, 42, 43]
    assert packed["target"].tolist() == [0, 1, 4, 8, 9, 10]
    assert packed["cu_second"].tolist() == [0, 1, 4]
    assert packed["keys_at"].tolist() == [0, 1, 4, 0, 1, 5, 6, 7]
    assert packed["cu_keys"].tolist() == [0, 3, 8]
    assert packed["copies"] == 2
    slots = Layout.of(packed).slots  # of `sources`: the first half's four tokens, then keys_at
    own, *others = slots.tolist()
    assert own == [0, 1, 2, 3, -1, -1, -1, -1]
    assert others == [[4, 5, -1, -1, 6, 9, 10, 11], [7, 8, -1, -1, -1, -1, -1, -1]]


def test_a_line_of_one_of_few_lengths_has_one_more_sequence():
    plain, longer = pack(ROWS, IMAGE), padded(pack(ROWS, IMAGE))
    assert longer["tokens"] == 64
    assert longer["ids"].tolist() == [[*plain["ids"][0].tolist(), *[0] * 53]]
    assert longer["cu_second"].tolist() == [0, 3, 4, 57]
    assert longer["cu_keys"].tolist() == [0, 6, 8, 61]
    assert longer["keys_at"].tolist() == [*plain["keys_at"].tolist(), *range(11, 64)]
    assert longer["max_second"] == longer["max_keys"] == 53
    for name in ("middle", "max_first", "copies"):
        assert longer[name] == plain[name]
    for name in ("answer_at", "labels", "target", "image_at", "cu_first"):
        assert torch.equal(longer[name], plain[name])
    lengths = [padded({**longer, "tokens": tokens})["tokens"] for tokens in (64, 1_500, 20_000, 20_479, 20_480)]
    assert lengths == [128, 1_536, 20_480, 20_480, 21_504]


def test_targets_point_at_each_answers_tokens_in_trls_layout():
    batch = collate(ROWS, PAD, IMAGE)
    shifted = batch["input_ids"][:, 1:]
    assert torch.equal(shifted.flatten()[batch["packed"]["target"]], batch["packed"]["labels"])
    answers = batch["completion_mask"][:, 1:].flatten().nonzero()[:, 0]
    assert torch.equal(batch["packed"]["target"].sort().values, answers)


def test_without_rejected_answers_there_is_no_second_half():
    alone = [{k: v for k, v in each.items() if k != "rejected_ids"} for each in ROWS]
    batch, packed = collate(alone, PAD, IMAGE), pack(alone, IMAGE)
    assert packed["ids"].tolist() == [[1, IMAGE, IMAGE, 11, 21, 1, 12]]
    assert packed["middle"] == packed["tokens"] == 7
    assert packed["answer_at"].tolist() == [3, 4, 6]
    assert packed["cu_second"].tolist() == packed["cu_keys"].tolist() == [0]
    assert len(packed["keys_at"]) == packed["max_second"] == packed["max_keys"] == 0
    assert batch["input_ids"].tolist() == [[1, IMAGE, IMAGE, 11, 21, 22], [1, 12, 41, PAD, PAD, PAD]]
    assert torch.equal(batch["input_ids"][:, 1:].flatten()[packed["target"]], packed["labels"])


def test_an_answer_without_tokens_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="without tokens"):
        pack([row([1, 12], [], [51])], IMAGE)
