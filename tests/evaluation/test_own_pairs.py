"""Pairs of a model's own answers: which become chosen and rejected, and that they are rows as any others."""

import json

import pytest
import torch
from datasets import Dataset
from PIL import Image

from smolvlm_exp.data.messages import assistant, text_of, user
from smolvlm_exp.data.preferences import Preferences, prepare
from smolvlm_exp.data.sources.shapes import Config
from smolvlm_exp.engine.generation.sampler import Answer
from smolvlm_exp.evaluation import own_pairs as module
from smolvlm_exp.evaluation.held_out import HeldOut, evaluate
from smolvlm_exp.evaluation.own_pairs import own_pairs
from smolvlm_exp.utils.errors import RequestError

CONFIG = Config(source="shapes")
GREEDY = ["A star.", "Yes.", "", "2"]  # to the four rows below
SAMPLED = [
    {"A star.": -9.0, "A moon.": -1.0, " A bolt. ": -2.0, "": -5.0},
    {"Yes.": -0.1, " Yes.": -0.2, "Yes. ": -0.3, "": -4.0},
    {"A star.": -0.1},
    {"2": -0.1, "3": -3.0, "1": -3.5, "4": -0.5},
]


def row(number, **answers):
    image = Image.new("RGB", (96, 64), (40 * number, 80, 200))
    truth = json.dumps({"kind": "caption", "objects": ["star"]} if number == 0 else {"kind": "yes_no", "answer": "yes"})
    return {"images": [image], "prompt": [user(f"What is {number}?")], "truth": truth, **answers}


def held_out(processor, count=4):
    rows = prepare(Dataset.from_list([row(i) for i in range(count)]), processor, CONFIG)
    return HeldOut(Preferences(rows.select([]), rows, {}), processor, 2, None)


@pytest.fixture
def answered(monkeypatch, processor):
    """The answers above in place of a model's; its seeds and numbers of prompts, try by try."""
    tries = []

    def sample(model, processor, prompts, sampling, answers, logps):
        assert (sampling.temperature, answers, logps) == (1.0, 4, True)
        tries.append((sampling.seed, len(prompts)))
        numbers = [number_of(processor, prompt) for prompt in prompts]
        return [
            [
                Answer(processor.tokenizer(text, add_special_tokens=False)["input_ids"], True, torch.full((3,), logp))
                for text, logp in SAMPLED[number].items()
            ]
            for number in numbers
        ]

    monkeypatch.setattr(module, "sample_answers", sample)
    monkeypatch.setattr(HeldOut, "answers", lambda self, model, count, sampling: GREEDY[:count])
    return tries


def number_of(processor, prompt):
    """The number of the row whose prompt it is."""
    return int(processor.decode(prompt.ids).rpartition("What is ")[2][0])


def test_rejected_is_the_unlikeliest_that_differs_and_rows_without_one_are_left_out(model, processor, answered, capsys):
    pairs = own_pairs(model, held_out(processor), CONFIG, max_new_tokens=8, seed=7)
    made = pairs.preferences.test
    assert [[text_of(side) for side in (p["prompt"], p["chosen"], p["rejected"])] for p in made] == [
        ["What is 0?", "A star.", "A bolt."], ["What is 3?", "2", "1"]
    ]  # fmt: skip
    assert [json.loads(truth)["kind"] for truth in made["truth"]] == ["caption", "yes_no"]
    assert "they are the model's own answers, in 2 of 4 held-out rows" in capsys.readouterr().out
    assert answered == [(7, 4), *((7 + 16 * n, 1) for n in range(1, 8))]  # row 1 is tried again
    given = [
        row(0, chosen=[assistant("A star.")], rejected=[assistant("A bolt.")]),
        row(3, chosen=[assistant("2")], rejected=[assistant("1")]),
    ]
    expected = prepare(Dataset.from_list(given), processor, CONFIG)
    for name in ("token_ids", "prompt_tokens", "chosen_tokens", "rejected_tokens", "image_tokens", "image_sha256"):
        assert made[name][:] == expected[name][:], name


def test_one_row_is_too_few(model, processor, answered):
    with pytest.raises(RequestError, match=r"data=shapes has no pairs .* 1 of 3 held-out rows .*Hold out more rows"):
        own_pairs(model, held_out(processor, 3), CONFIG, max_new_tokens=8, seed=7)


def test_a_model_scores_its_own_pairs_and_answers_all_rows(model, processor):
    """A real model's answers at temperature 1 come out the same again, and are no part of what it answers."""
    rows = held_out(processor)
    pairs, again = (own_pairs(model, rows, CONFIG, max_new_tokens=8, seed=3) for _ in range(2))
    assert pairs.preferences.test["token_ids"][:] == again.preferences.test["token_ids"][:]
    measured = evaluate(model, rows, max_new_tokens=8, pairs=pairs)
    assert len(measured.answers) == 4
    assert measured.logps.chosen.shape == (len(pairs),)
    assert {"preference_accuracy", "yes_no_accuracy", "blank_image_drop"} <= measured.metrics.keys()
    assert "preference_accuracy" not in evaluate(model, rows, max_new_tokens=8).metrics
