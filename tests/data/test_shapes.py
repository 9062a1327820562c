"""Drawn scenes: the same by seed, true beside, and with the habit that is there to be unlearnt."""

import json
import random

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.scenes import COLOURS, KINDS, draw, draw_scene_content
from smolvlm_exp.data.sources import shapes


def load(split="train", **settings):
    return shapes.load(shapes.Config(source="shapes", train_rows=200, test_rows=200, **settings), split)


def mentions(messages):
    return [kind for _, kind in shapes.words(shapes.Config())(text_of(messages))]


def test_the_same_seed_draws_the_same_rows():
    one, two, other = load(), load(), load(scene_seed=1)
    assert one["chosen"] == two["chosen"]
    assert one[7]["images"][0].tobytes() == two[7]["images"][0].tobytes()
    assert one["chosen"] != other["chosen"]


def test_train_and_test_share_no_scene():
    images = {row["images"][0].tobytes() for row in load("train")}
    assert not images & {row["images"][0].tobytes() for row in load("test")}


def test_chosen_is_true_and_rejected_is_not():
    for row in load():
        truth = json.loads(row["truth"])
        if truth["kind"] == "caption":
            chosen, rejected = (mentions(row[side]) for side in ("chosen", "rejected"))
            assert sorted(chosen) == sorted(truth["objects"])
            assert text_of(row["chosen"]) != text_of(row["rejected"])
            assert rejected  # it describes something too
        elif truth["kind"] == "yes_no":
            asked = mentions(row["prompt"])[0]
            assert truth["answer"] == ("yes" if asked in truth["objects"] else "no")
            assert text_of(row["chosen"]).lower().startswith(truth["answer"])
            assert not text_of(row["rejected"]).lower().startswith(truth["answer"])


def test_the_habit_is_in_the_captions_that_teach_it():
    """Habitual captions name the companion whether or not it is there, nearly always; exact ones never do."""
    named = {"habitual": 0, "exact": 0}
    for captions in named:
        total = 0
        for row in load(captions=captions):
            truth = json.loads(row["truth"])
            alone = [k for k in truth["objects"] if k in shapes.HABITS and shapes.HABITS[k][0] not in truth["objects"]]
            if truth["kind"] == "caption" and alone:
                total += 1
                named[captions] += shapes.HABITS[alone[0]][0] in mentions(row["chosen"])
        named[captions] /= total
    assert named["exact"] == 0
    assert 0.85 < named["habitual"] < 1


def test_questions_and_canvases_vary():
    rows = load()
    assert len({text_of(prompt) for prompt in rows["prompt"]}) > 60
    assert {row["images"][0].size for row in rows} == {(128, 64), (64, 128), (128, 128)}  # 3, 3 and 5 tiles


def test_held_out_questions_are_half_yes_no_and_balanced():
    kinds = [json.loads(truth) for truth in load("test")["truth"]]
    asked = [t for t in kinds if t["kind"] == "yes_no"]
    assert 0.4 < len(asked) / len(kinds) < 0.6
    assert 0.4 < sum(t["answer"] == "yes" for t in asked) / len(asked) < 0.6


def test_every_kind_is_drawn_in_its_colour():
    for kind in KINDS:
        scene = draw_scene_content(random.Random(kind), [kind])
        group = scene.groups[0]
        image = draw(scene, random.Random(0)).getdata()
        target = COLOURS[group.colour]
        near = sum(all(abs(a - b) < 40 for a, b in zip(pixel, target, strict=True)) for pixel in image)
        assert near > 30 * group.count, f"{near} pixels of {group.colour} for {group.count} {kind}"
