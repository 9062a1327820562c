"""Rows that enter and leave while others are decoded: answers are those of `generate` and of the sampler."""

import random
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_exp.engine.generation import continuous
from smolvlm_exp.engine.generation.continuous import ContinuousBatch, Request, past_length
from smolvlm_exp.engine.generation.decoder import Decoder
from smolvlm_exp.engine.generation.sampler import sample
from smolvlm_exp.engine.generation.sampling import Sampling
from tests.engine.generation.test_sampler import (
    DEVICES,
    END,
    KERNELS,
    model_on,
    prompts_of,
    random_row,
    rows_of,
    tiny_model,
    upstream,
    with_end,
)
from tests.engine.stock import IMAGE


def request_of(prompt, sampling, past=()):
    """A sampler's prompt, of which `past` was read before."""
    known = past_length(past)
    ids = prompt.ids[known:].tolist()
    image_at = [i for i, token in enumerate(ids) if token == IMAGE]
    features = [prompt.features().flatten(0, 1)] if image_at else []
    return Request(ids, sampling, past, image_at, features)


def decode(batch, requests, seed, most=4, end=END):
    """The ids of every answer, the end token included; some enter whenever there is room, and then a step is made."""
    rng, waiting = random.Random(seed), deque(enumerate(requests))
    answers, active = [[] for _ in requests], []

    def add(tokens, numbers):
        for number, token in zip(numbers, tokens, strict=True):
            answers[number].append(token)
        for row in reversed(range(len(active))):
            ids = answers[active[row]]
            if ids[-1] == end or len(ids) == requests[active[row]].sampling.max_new_tokens:
                batch.leave(row, len(ids) - 1)
                active[row] = active[-1]
                active.pop()

    while waiting or active:
        entering = [waiting.popleft() for _ in range(min(rng.randint(0, 3), len(waiting), most - len(active)))]
        if entering:
            numbers, some = zip(*entering, strict=True)
            active += numbers
            add(batch.enter(some), numbers)
        if active:
            add(batch.step()(), [*active])
    assert batch.rows == []
    return answers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kv_heads", "adapter"), [(4, None), (2, "dora"), (1, "lora")])
@torch.no_grad()
def test_greedy_answers_are_those_of_generate(device, kv_heads, adapter, monkeypatch):
    """Prompts with up to two images and answers of 1 to 12 tokens, in buffers that have to grow."""
    monkeypatch.setattr(continuous, "SMALLEST", (1, 4, 2))
    model = model_on(device, kv_heads, adapter)
    rows = rows_of(12, seed=kv_heads)
    end = upstream(model, rows[0], 5, end=None)[4]  # a token that the model does come to
    limits = [1 + 5 * i % 12 for i in range(len(rows))]
    requests = [request_of(p, Sampling(n)) for p, n in zip(prompts_of(model, rows), limits, strict=True)]
    batch = ContinuousBatch(Decoder(model), end)
    expected = [upstream(model, row, n, end) for row, n in zip(rows, limits, strict=True)]
    assert decode(batch, requests, seed=0, end=end) == expected
    assert decode(batch, requests, seed=1, end=end) == expected  # rows that are free have been used


SAMPLINGS = st.builds(
    Sampling,
    max_new_tokens=st.integers(1, 20),
    min_new_tokens=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    seed=st.integers(0, 99),
)


@pytest.mark.parametrize("device", DEVICES)
@given(samplings=st.lists(SAMPLINGS, min_size=1, max_size=7), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_an_answer_depends_on_its_own_sampling_alone(device, samplings, seed):
    """Whatever its neighbours are and whenever they come, it is the sampler's answer to that prompt alone."""
    model = tiny_model(seed=1, **KERNELS[device]).to(device)
    rows = [random_row(1 + i, 1, 1, [1], seed=seed + i) for i in range(len(samplings))]
    prompts = prompts_of(model, rows)
    requests = [request_of(*pair) for pair in zip(prompts, samplings, strict=True)]
    together = decode(ContinuousBatch(Decoder(model), END), requests, seed)
    for prompt, sampling, answer in zip(prompts, samplings, together, strict=True):
        ((_, (alone,)),) = sample(Decoder(model), [prompt], sampling, END, IMAGE)
        assert answer == with_end(alone)


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_row_continues_from_what_another_has_read(device):
    """From the first tokens of a prompt, whatever of them is known, beside a row that reads its own from the start."""
    model = tiny_model(**KERNELS[device]).to(device)
    first, second = prompts_of(model, rows := rows_of(2, seed=8))
    batch = ContinuousBatch(Decoder(model), END)
    answer = [batch.enter([request_of(first, Sampling(9))])[0], *(batch.step()()[0] for _ in range(8))]
    (past,) = batch.leave(0, read=8)
    read = [*rows[0]["prompt_ids"].tolist(), *answer[:8]]
    assert past.shape[2] == len(read)
    rows[0]["prompt_ids"] = torch.tensor([*read, answer[8], 9, 10, 11])
    whole = prompts_of(model, rows)[0]
    expected = [upstream(model, row, 6, end=None) for row in rows]
    for known in (len(read), len(rows_of(2, seed=8)[0]["prompt_ids"])):
        requests = [request_of(whole, Sampling(6), (past[:, :, :known],)), request_of(second, Sampling(6))]
        assert decode(batch, requests, seed=0, end=-1) == expected


@torch.no_grad()
def test_a_prompt_that_fails_leaves_the_others_as_they_are():
    model = tiny_model()
    prompts, rows = prompts_of(model, rows_of(2, seed=3)), rows_of(2, seed=3)
    batch = ContinuousBatch(Decoder(model), END)
    tokens = batch.enter([request_of(prompts[0], Sampling(6))])
    with pytest.raises(IndexError):
        batch.enter([request_of(prompts[1], Sampling(70)), Request([10_000], Sampling(6))])
    tokens += [batch.step()()[0] for _ in range(5)]
    assert tokens == upstream(model, rows[0], 6, end=None)


def test_rows_that_do_not_fit_into_memory(monkeypatch):
    """By hand: 2 layers, 2 key heads of 8, float32 (256 bytes per token), 300 + 10 tokens in buffers of 512 + 64."""
    batch = ContinuousBatch(Decoder(tiny_model()), END)
    monkeypatch.setattr(continuous, "free_memory", lambda device: int(2 * 576 * 256 / 0.8) + 1)
    assert batch.fits([300], [10])
    assert batch.fits([300, 20], [10, 64])
    assert not batch.fits([300, 20, 20], [10, 10, 10])  # four rows
    assert not batch.fits([600], [300])
    batch.enter([Request([9], Sampling(2))])
    monkeypatch.setattr(continuous, "free_memory", lambda device: 0)
    assert not batch.fits([1], [1])
    batch.leave(0, 0)
    assert batch.fits([200], [60])  # there is a row of that size
