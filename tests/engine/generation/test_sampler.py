"""The sampler against transformers' `generate`, token for token in float32, and what it promises about its rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_exp.engine.forward import image_features
from smolvlm_exp.engine.generation import batch, sampler
from smolvlm_exp.engine.generation.decoder import Decoder
from smolvlm_exp.engine.generation.sampler import Prompt, sample
from smolvlm_exp.engine.generation.sampling import Sampling, draw, draw_rows, uniforms
from smolvlm_exp.engine.model_parts import core_of
from tests.engine.stock import IMAGE, PAD, pixels, random_row, tiny_adapter, tiny_model

END = 8
KERNELS = {"cpu": {}, "cuda": {"hidden_size": 128}}  # heads of 32 columns, from which on the kernels serve
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def prompts_of(model, rows):
    """Prompts with their images' features, which are worked out when the prompt is read."""
    core, device = core_of(model), model.device

    def features(row):
        return image_features(core, pixels(row["tiles"].to(device)))

    return [Prompt(row["prompt_ids"], (lambda row=row: features(row)) if len(row["tiles"]) else None) for row in rows]


def upstream(model, row, count, end=END, **how):
    """The ids that transformers' `generate` answers with, the end token included."""
    ids = row["prompt_ids"][None].to(model.device)
    images = {"pixel_values": pixels(row["tiles"].to(model.device))[None]} if len(row["tiles"]) else {}
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **images, max_new_tokens=count, do_sample=False,
        eos_token_id=end, pad_token_id=PAD, **how,
    )  # fmt: skip
    return made[0, ids.shape[1] :].tolist()


def with_end(answer, end=END):
    return [*answer.ids, end] if answer.ended else answer.ids


def model_on(device, kv_heads, adapter):
    """`adapter`: None, "lora" or "dora"."""
    model = tiny_model(kv_heads=kv_heads, **KERNELS[device])
    if adapter:
        model = tiny_adapter(model, "text", use_dora=adapter == "dora")
    return model.to(device).eval()


def rows_of(count, seed):
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=draw))

    return [
        random_row(number(1, 9), 1, 1, [number(1, 4) for _ in range(number(0, 3))], seed=seed + i) for i in range(count)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
@torch.no_grad()
def test_greedy_answers_are_those_of_generate(device, kv_heads, adapter, monkeypatch):
    """Random prompts with up to two images, more of them than fit, so that they leave and enter."""
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 60)
    model = model_on(device, kv_heads, adapter)
    rows = rows_of(9, seed=kv_heads)
    end = upstream(model, rows[0], 5, end=None)[4]  # a token that the model does come to
    for merge in (True, False):
        answers = dict(sample(Decoder(model, merge), prompts_of(model, rows), Sampling(12), end, IMAGE, rows=4))
        expected = [upstream(model, row, 12, end) for row in rows]
        assert [with_end(answers[i][0], end) for i in range(len(rows))] == expected
    assert any(answer.ended for (answer,) in answers.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.no_grad()
def test_the_image_token_is_not_drawn_even_where_it_is_the_likeliest(temperature):
    """As TRL's suppress_tokens: an answer with it in would want another image at the next step."""
    model, row = tiny_model(), random_row(5, 1, 1, [1], seed=2)
    images = {"pixel_values": pixels(row["tiles"])[None]}
    hidden = core_of(model)(input_ids=row["prompt_ids"][None], **images).last_hidden_state[0, -1]
    model.lm_head.weight[IMAGE] = 100 * hidden / hidden.square().sum()
    for suppress in ((), (IMAGE,)):
        sampling = Sampling(1, temperature=temperature, suppress=suppress)
        ((_, answers),) = sample(Decoder(model), prompts_of(model, [row]), sampling, END, IMAGE, answers=8, logps=True)
        assert all((IMAGE in answer.ids) == (suppress == ()) for answer in answers)
    how = {"suppress_tokens": [IMAGE], "renormalize_logits": True}
    if not temperature:
        assert with_end(answers[0]) == upstream(model, row, 1, **how)


@pytest.mark.parametrize("temperature", [1e-40, 1e-320, 1e-7])
def test_the_coldest_temperatures_draw_the_likeliest_token(temperature):
    logits, uniform = torch.tensor([[1.0, 9.0, 8.0], [-3.0, -9.0, -50.0]]), torch.tensor([0.999, 0.0])
    assert draw(logits, uniform, Sampling(temperature=temperature)).tolist() == [1, 0]
    settings = (torch.tensor([temperature] * 2), torch.ones(2), torch.zeros(2))
    assert draw_rows(logits, uniform, *settings, truncates=True).tolist() == [1, 0]


def test_seeds_beyond_32_bits_draw_other_numbers():
    """PyTorch's generator drops the higher bits, in which runs and rounds of one seed differ."""
    seeds = [5, 5 + 2**32, 5 + 2**40, 5 + 2**41]
    drawn = uniforms(seeds, 3)
    assert len({tuple(row.tolist()) for row in drawn}) == len(seeds)
    assert torch.equal(drawn[0], torch.rand(3, generator=torch.Generator().manual_seed(5)))


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), answers=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_an_answer_does_not_depend_on_its_batch(lengths, answers, seed):
    """Drawn at a temperature, alone and with others, few and many at a time: the seed alone decides."""
    model = tiny_model(seed=1)
    rows = [random_row(length, 1, 1, [1], seed=seed + length) for length in lengths]
    prompts, sampling = prompts_of(model, rows), Sampling(8, temperature=1.3, seed=seed)
    together = dict(sample(Decoder(model), prompts, sampling, END, IMAGE, answers, rows=64))
    few = dict(sample(Decoder(model), prompts, sampling, END, IMAGE, answers, rows=answers))
    assert together == few
    for i, prompt in enumerate(prompts):
        alone = Sampling(8, temperature=1.3, seed=seed + i * answers)
        ((_, by_itself),) = sample(Decoder(model), [prompt], alone, END, IMAGE, answers)
        assert by_itself == together[i]


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_log_probabilities_are_those_of_the_drawn_tokens(device):
    """Held against one forward pass over prompt and answer, at the temperature of the draw."""
    model = tiny_model(**KERNELS[device]).to(device)
    rows, temperature = rows_of(4, seed=5), 0.7
    sampling = Sampling(10, temperature=temperature, seed=3)
    found = dict(sample(Decoder(model), prompts_of(model, rows), sampling, END, IMAGE, answers=2, logps=True))
    compared = 0
    for i, row in enumerate(rows):
        images = {"pixel_values": pixels(row["tiles"].to(device))[None]} if len(row["tiles"]) else {}
        for answer in found[i]:
            if IMAGE in answer.ids:  # which transformers would want an image for
                continue
            compared += 1
            drawn = torch.tensor(with_end(answer))
            ids = torch.cat((row["prompt_ids"], drawn))[None].to(device)
            logits = model(input_ids=ids, **images).logits[0, len(row["prompt_ids"]) - 1 : -1] / temperature
            expected = logits.log_softmax(1).gather(1, drawn[:, None].to(device))[:, 0].cpu()
            torch.testing.assert_close(answer.logps, expected, atol=1e-5, rtol=1e-4)
    assert compared >= 4


@torch.no_grad()
def test_the_end_token_waits_for_min_new_tokens():
    model, rows = tiny_model(), rows_of(6, seed=2)
    answers = dict(sample(Decoder(model), prompts_of(model, rows), Sampling(9, min_new_tokens=7), END, IMAGE))
    expected = [upstream(model, row, 9, min_new_tokens=7) for row in rows]
    assert [with_end(answers[i][0]) for i in range(len(rows))] == expected
    assert all(len(with_end(answer)) >= 7 for (answer,) in answers.values())


@torch.no_grad()
def test_a_prompt_is_read_once_for_all_its_answers(monkeypatch):
    """And its images when its turn comes."""
    model, read = tiny_model(), []
    ordinary = batch.SamplingBatch.read
    monkeypatch.setattr(
        batch.SamplingBatch, "read", lambda self, groups, embeddings, *rest: (
            read.append(embeddings.shape[0]), ordinary(self, groups, embeddings, *rest)
        )
    )  # fmt: skip
    answers = dict(sample(Decoder(model), prompts_of(model, rows_of(5, seed=4)), Sampling(3), END, IMAGE, 4, rows=8))
    assert sum(read) == 5
    assert [len(answers[i]) for i in range(5)] == [4] * 5


@torch.no_grad()
def test_a_model_is_left_as_it_was():
    """trainer.engine=stock is plain TRL and PEFT, also after answers were sampled from it."""
    model = tiny_adapter(tiny_model(), "text", use_dora=True).eval()
    ids, modules = torch.arange(10, 16)[None], {name: vars(m).copy() for name, m in model.named_modules()}
    before = model(input_ids=ids).logits
    list(sample(Decoder(model), prompts_of(model, rows_of(2, seed=1)), Sampling(3), END, IMAGE))
    assert torch.equal(model(input_ids=ids).logits, before)
    assert {name: vars(m).keys() for name, m in model.named_modules()} == {n: v.keys() for n, v in modules.items()}


@torch.no_grad()
def test_nothing_to_answer():
    assert list(sample(Decoder(tiny_model()), [], Sampling(3), END, IMAGE)) == []


# Drawing one token


def frequencies(sampling, logits, count=40_000):
    drawn = draw(logits.expand(count, -1), uniforms([0], count)[0], sampling)
    return torch.bincount(drawn, minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.69}, [0, 0, 3 / 7, 4 / 7]),  # 0.4 + 0.3 reach it
        ({"top_p": 0.71}, [0, 2 / 9, 3 / 9, 4 / 9]),
        ({"top_p": 1e-6}, [0, 0, 0, 1]),  # the nucleus is never empty
        ({"top_p": 0.95, "top_k": 1}, [0, 0, 0, 1]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(how, expected):
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    torch.testing.assert_close(
        frequencies(Sampling(**{"temperature": 1.0, **how}), logits),
        torch.tensor(expected, dtype=torch.float32),
        atol=0.01,
        rtol=0,
    )


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for uniform in (0.0, 0.5, 1 - 2**-24):
        assert draw(logits, torch.tensor([uniform]), Sampling(temperature=1.0)).tolist() == [1]


# A step's attention


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("answers", "heads", "kv_heads"), [(1, 4, 4), (3, 4, 2), (8, 3, 1)])
def test_a_step_attends_to_its_prompt_and_its_own_tokens(device, answers, heads, kv_heads):
    """Against plain softmax attention over each row's keys, written out row by row."""
    torch.manual_seed(0)
    groups, longest, width, size, scale = 2, 300, 70, 32, 0.3
    rows, lengths = groups * answers, torch.tensor([5, 290])
    at = torch.randint(0, width, (rows,))
    shared = torch.randn(2, groups, kv_heads, longest, size)
    own = torch.randn(2, rows, kv_heads, width, size)
    qkv, angle = torch.randn(rows, (heads + 2 * kv_heads) * size), torch.randn(rows, size // 2)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    inputs = [t.to(device) for t in (qkv, cos, sin, shared, own.clone(), lengths, at)]
    found = batch.step_attention(*inputs, scale, (heads, kv_heads)).cpu()
    query, key, value = batch.rotated_heads(qkv, cos, sin, (heads, kv_heads))
    for row in range(rows):
        group = row // answers
        for head in range(heads):
            kv = head // (heads // kv_heads)
            keys, values = (
                torch.cat((shared[i, group, kv, : lengths[group]], own[i, row, kv, : at[row]], new[row, kv][None]))
                for i, new in enumerate((key, value))
            )
            expected = (keys @ query[row, head] * scale).softmax(0) @ values
            torch.testing.assert_close(found[row].view(heads, size)[head], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(inputs[4].cpu()[0, row, :, at[row]], key[row])


# Memory


def test_a_plan_is_merged_where_that_leaves_room_and_has_as_many_rows_as_fit():
    """By hand: 2 layers of 32 wide, 2 key heads of 8, MLP 48, vocabulary 40, float32."""
    model = tiny_model()
    token, row = 2 * 2 * 2 * 8 * 4, 10 * 2 * 2 * 2 * 8 * 4 + 12 * 40
    group, prefill = 100 * token + row, 4 * (4 * 32 + 3 * 48 + 3 * 32)
    unpacked = 2 * 4 * (32 * 8 * 2 * (4 + 2) + 3 * 32 * 48)

    def plan(usable):
        return sampler.plan_sampling(model, -(-(usable + 100 * prefill) * 5 // 4), longest=100, new_tokens=10)

    assert plan(unpacked + group) == sampler.SamplingPlan(True, 1, 100)
    assert not plan(unpacked + group - 50).merge
    assert plan(unpacked + 3 * group).rows == 3
    assert plan(10**9) == sampler.SamplingPlan(True, sampler.ROWS, sampler.PREFILL_TOKENS)
    assert plan(0) == sampler.SamplingPlan(False, 1, 100)
