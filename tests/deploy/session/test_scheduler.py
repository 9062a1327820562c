"""Answers that are generated together: none depends on another, and none takes another with it."""

import logging
import threading
from unittest import mock

import pytest
import torch
from PIL import Image
from torch.testing._internal.two_tensor import TwoTensor

from smolvlm_exp.data.messages import user
from smolvlm_exp.deploy.session import runner
from smolvlm_exp.deploy.session.answer import AnswerError
from smolvlm_exp.deploy.session.backends import BaseModel, TorchModel
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.engine.generation.continuous import ContinuousBatch
from smolvlm_exp.engine.generation.decoder import Decoder, decoder_obstacle
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.utils.errors import RequestError

COLOURS = ("red", "green", "blue", "white", "black", "teal", "gold")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def load(folder, device="cpu"):
    session = SmolVLMSession.load(folder, rows=4)
    session.model.model.float().to(device)
    return session


@pytest.fixture
def session(small):
    return load(small)


def prompts_of(session):
    """One for each colour, with an image of its own and texts of different lengths."""
    images = [Image.new("RGB", (64 + 32 * (i % 2), 64), colour) for i, colour in enumerate(COLOURS)]
    return [session.prompts.build([user("Why? " * (i + 1), 1)], [image]) for i, image in enumerate(images)]


def together(answers):
    """Begins all before any of them is looked at; their texts as they came, or the error."""
    pieces, ended = [[] for _ in answers], [threading.Event() for _ in answers]
    for answer, received, event in zip(answers, pieces, ended, strict=True):
        answer.start(lambda p, received=received, event=event: event.set() if p is None else received.append(p))
    assert all(event.wait(60) for event in ended)
    return ["".join(received) for received in pieces]


def samplings(stop=()):
    """Greedy and drawn, of different lengths."""
    return [
        Sampling(8 + 3 * i, temperature=0.8 * (i % 2), top_p=0.9 if i % 3 else 1, seed=i, stop=stop)
        for i in range(len(COLOURS))
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_answers_together_are_those_alone(device, small):
    """More of them than rows, so that they wait, enter and leave; the tower takes new images together."""
    session = load(small, device)
    passes, features = [], session.model.features
    session.model.features = lambda pixels, mask: (passes.append(pixels.shape[1]), features(pixels, mask))[1]
    answers = [session.answer(*pair) for pair in zip(prompts_of(session), samplings(), strict=True)]
    texts = together(answers)
    for prompt, sampling, answer, text in zip(prompts_of(session), samplings(), answers, texts, strict=True):
        alone = load(small, device).answer(prompt, sampling)
        assert alone.finish() == text.strip()
        assert (alone.ids, alone.ended_by) == (answer.ids, answer.ended_by)
    assert len(passes) < len(COLOURS)
    again = [session.answer(*pair) for pair in zip(prompts_of(session), samplings(), strict=True)]
    assert together(again) == texts
    assert all(answer.cached_tokens == answer.prompt_tokens - 1 for answer in again)


def test_a_step_begun_ahead_changes_no_answer(session):
    """As on a GPU, where a row makes a step more before its end is seen."""
    expected = together([session.answer(*pair) for pair in zip(prompts_of(session), samplings(), strict=True)])
    session.scheduler.runners[False].batch.runs_ahead = True
    for _ in range(2):  # the second time from keys and values that were cached
        answers = [session.answer(*pair) for pair in zip(prompts_of(session), samplings(), strict=True)]
        assert together(answers) == expected
    assert all(answer.cached_tokens == answer.prompt_tokens - 1 for answer in answers)


def test_stop_texts_end_one_answer_and_not_its_neighbours(session):
    complete = together([session.answer(*pair) for pair in zip(prompts_of(session), samplings(), strict=True)])
    word = complete[4].split()[2]
    answers = [session.answer(*pair) for pair in zip(prompts_of(session), samplings((word, "\0")), strict=True)]
    texts = together(answers)
    assert texts == [text.split(word)[0] for text in complete]
    assert answers[4].ended_by == "stop"
    assert len(answers[4].ids) < answers[4].sampling.max_new_tokens


def test_an_answer_that_fails_fails_alone(session, monkeypatch):
    """One that cannot be read when it enters together with others; then an error of the whole batch."""
    prompts = prompts_of(session)
    expected = together([session.answer(*pair) for pair in zip(prompts_of(session), samplings(), strict=True)])
    prompts[2].ids[-1] = 10**6  # no token
    answers = [session.answer(*pair) for pair in zip(prompts, samplings(), strict=True)]
    texts = together(answers)
    assert texts == [*expected[:2], "", *expected[3:]]
    with pytest.raises(AnswerError, match="the answer failed: IndexError"):
        answers[2].check()

    def fails(batch):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(ContinuousBatch, "step", fails)
        with pytest.raises(AnswerError, match="RuntimeError: out of memory"):
            session.answer(prompts[0], samplings()[0]).finish()
    assert together([session.answer(prompts_of(session)[0], samplings()[0])]) == expected[:1]


def test_a_model_that_cannot_be_prepared_fails_those_that_wait(session, monkeypatch):
    def fails(*_):
        raise RuntimeError("no room for its weights")

    monkeypatch.setattr(runner, "make_batch", fails)
    with pytest.raises(AnswerError, match="no room for its weights"):
        session.conversation().say("Why?").finish()


def test_prompts_that_do_not_fit_wait_for_those_that_are_there(session, monkeypatch):
    entered, enter = [], ContinuousBatch.enter
    monkeypatch.setattr(ContinuousBatch, "fits", lambda batch, lengths, _: len(batch.rows) + len(lengths) <= 2)
    monkeypatch.setattr(
        ContinuousBatch,
        "enter",
        lambda batch, some: (entered.append(len(batch.rows) + len(some)), enter(batch, some))[1],
    )
    texts = together([session.answer(*pair) for pair in zip(prompts_of(session), samplings(), strict=True)])
    assert all(texts)
    assert max(entered) == 2


def test_what_is_set_aside_for_earlier_answers_is_freed_where_the_next_does_not_fit(session, monkeypatch):
    prompt = prompts_of(session)[0]
    expected = session.answer(prompt.copy(), Sampling(8)).finish()
    runner = session.scheduler.runners[False]
    monkeypatch.setattr(ContinuousBatch, "fits", lambda *_: False)
    with mock.patch.object(runner.batch, "clear", wraps=runner.batch.clear) as clear:
        assert session.answer(prompt.copy(), Sampling(8)).finish() == expected
    assert clear.call_count == 1


def test_base_and_fine_tuned_answer_side_by_side(adapted, processor):
    """In one session, at the same time; each as transformers generates it, with the adapter on and off."""
    session = SmolVLMSession(TorchModel(adapted), processor, rows=4)
    prompt = session.prompts.build([user("Describe the picture.", 0)], [])
    ids, sampling = torch.tensor([prompt.ids]), Sampling(8)
    with adapted.disable_adapter():
        base = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, len(prompt.ids) :].tolist()
    after = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, len(prompt.ids) :].tolist()
    assert base != after
    answers = [session.answer(prompt.copy(), sampling, base=i % 3 == 0) for i in range(7)]
    together(answers)
    for answer in answers:
        assert answer.ids == (base if answer.base else after)
    again = session.answer(prompt.copy(), sampling, base=True)
    together([again])
    assert (again.ids, again.cached_tokens) == (base, len(prompt.ids) - 1)
    slowly = BaseModel(adapted).extend(prompt.ids, [], [], ())[0].argmax()  # as where the engine cannot run it
    assert slowly == base[0]


def test_without_an_adapter_there_is_no_base(session):
    with pytest.raises(RequestError, match="no adapter that could be left out"):
        session.answer(prompts_of(session)[0], base=True)


def test_closing_stops_answers_that_run_and_answers_that_wait(session):
    answers = [session.answer(prompt, Sampling(800)) for prompt in prompts_of(session)]
    ended = [threading.Event() for _ in answers]
    for answer, event in zip(answers, ended, strict=True):
        answer.start(lambda piece, event=event: event.set() if piece is None else None)
    session.close()
    assert all(event.is_set() for event in ended)
    assert session.scheduler.thread is None
    assert session.scheduler.active == []
    assert all(len(answer.ids) < 800 for answer in answers)
    assert session.conversation().say("Why?", sampling=Sampling(3)).finish() == ""


def test_weights_in_a_form_of_their_own_keep_transformers_forward_pass(session, small, caplog):
    """As torchao's are: tensors around other tensors. The log says so once, and answers are the same."""
    other = load(small)
    text = other.model.model.model.text_model
    for module in text.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach()
            module.weight = torch.nn.Parameter(TwoTensor(weight, weight), requires_grad=False)
    assert "torchao" in decoder_obstacle(other.model.model)
    extend, plain = other.model.extend, lambda value: value.a if isinstance(value, TwoTensor) else value

    def unwrapped(*arguments):
        logits, past = extend(*arguments)
        return plain(logits), tuple(map(plain, past))

    other.model.extend = unwrapped
    both = []
    with caplog.at_level(logging.INFO):
        for each in (session, other):
            both.append(together([each.answer(*pair) for pair in zip(prompts_of(each), samplings(), strict=True)]))
    assert both[0] == both[1]
    assert [record.message for record in caplog.records if "quantised by torchao" in record.message] == [
        "answers: a row after another by transformers' forward pass, and slower: its weights are quantised by torchao"
    ]


def test_torchaos_weights_are_run_by_transformers(session):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = session.model.model
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(NotImplementedError):
        Decoder(model)
    assert "torchao" in decoder_obstacle(model)
    answer = session.conversation().say("Why?", sampling=Sampling(5))
    ids = torch.tensor([answer.prompt.ids])
    answer.finish()
    end = session.prompts.end
    expected = model.generate(
        input_ids=ids, attention_mask=ids > 0, max_new_tokens=5, do_sample=False, eos_token_id=end
    )
    assert answer.ids == expected[0, ids.shape[1] :].tolist()
