"""Drawn scenes: the same by seed, with their exact truth, and with the habit that is there to be trained away."""

import functools
import io
import json
import random

import datasets
import pytest
from PIL import Image

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.scenes import COLOURS, KINDS, SIZES, draw, draw_scene_content
from smolvlm_exp.data.sources import shapes
from smolvlm_exp.evaluation.exact_match import exact_match
from smolvlm_exp.evaluation.hallucination import description_counts


def load(split="train", count=200, **settings):
    config = shapes.Config(source="shapes", train_rows=count, test_rows=count, **settings)
    rows = shapes.load(config, split).to_list()
    return [{**row, "truth": json.loads(row["truth"]), "image": row["images"][0]["bytes"]} for row in rows]


once = functools.cache(load)
WORDS = shapes.words(shapes.Config())


def mentions(messages):
    return [kind for _, kind in WORDS(text_of(messages))]


def test_scenes_depend_on_the_seed_and_the_split_alone():
    rows = once()
    assert load(count=20) == rows[:20]
    assert [row["chosen"] for row in load(count=20, scene_seed=1)] != [row["chosen"] for row in rows[:20]]
    assert not {row["image"] for row in rows} & {row["image"] for row in once("test")}


def test_scenes_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    drawn = load(count=20)
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "draw_row", lambda *_, **__: pytest.fail("drawn again"))
        assert load(count=20) == drawn
    (tmp_path / "scenes.py").write_text("")
    monkeypatch.setattr(shapes.scenes, "__file__", str(tmp_path / "scenes.py"))  # other code may draw other scenes
    load(count=20)
    assert len(list(tmp_path.glob("smolvlm_exp/*.arrow"))) == 2


def test_chosen_is_true_and_rejected_is_not():
    for row in once():
        truth, chosen, rejected = row["truth"], text_of(row["chosen"]), text_of(row["rejected"])
        if truth["kind"] == "caption":
            assert sorted(mentions(row["chosen"])) == sorted(truth["objects"])
            assert chosen != rejected
            assert mentions(row["rejected"])  # it describes something too
        elif truth["kind"] == "yes_no":
            assert truth["answer"] == ("yes" if mentions(row["prompt"])[0] in truth["objects"] else "no")
            assert chosen.lower().startswith(truth["answer"])
            assert not rejected.lower().startswith(truth["answer"])


def test_truth_says_everything_that_an_answer_may():
    kinds = {"caption": 0, "yes_no": 0, "number": 0, "answer": 0}
    for row in once():
        truth, chosen = row["truth"], text_of(row["chosen"])
        kinds[truth["kind"]] += 1
        if truth["kind"] == "caption":
            assert description_counts(chosen, truth, WORDS) == (len(truth["objects"]),) * 2
            assert [text.split()[-3] in SIZES for text in truth["phrases"]] == [True] * len(truth["objects"])
        elif truth["kind"] != "yes_no":
            assert exact_match(chosen, truth["answer"])
            assert not exact_match(text_of(row["rejected"]), truth["answer"])
            assert isinstance(truth["answer"], int if "many" in text_of(row["prompt"]) else str)
    assert min(kinds.values()) > 0


def test_habitual_captions_name_the_absent_companion_and_exact_ones_never_do():
    def share(rows):
        named = []
        for row in rows:
            objects = row["truth"]["objects"]
            absent = [shapes.HABITS[k][0] for k in objects if k in shapes.HABITS and shapes.HABITS[k][0] not in objects]
            if row["truth"]["kind"] == "caption" and absent:
                named.append(absent[0] in mentions(row["chosen"]))
        return sum(named) / len(named)

    assert share(once()) == 0
    assert 0.85 < share(load(captions="habitual")) < 1


def test_questions_and_canvases_vary():
    assert len({text_of(row["prompt"]) for row in once()}) > 60
    sizes = {Image.open(io.BytesIO(row["image"])).size for row in once()}
    assert sizes == {(128, 64), (64, 128), (128, 128)}  # 3, 3 and 5 tiles


def test_held_out_questions_are_half_yes_no_and_balanced():
    truths = [row["truth"] for row in once("test")]
    answers = [truth["answer"] for truth in truths if truth["kind"] == "yes_no"]
    assert 0.4 < len(answers) / len(truths) < 0.6
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_every_kind_is_drawn_in_its_colour():
    for kind in KINDS:
        scene = draw_scene_content(random.Random(kind), [kind])
        group = scene.groups[0]
        image = draw(scene, random.Random(0)).getdata()
        target = COLOURS[group.colour]
        near = sum(all(abs(a - b) < 40 for a, b in zip(pixel, target, strict=True)) for pixel in image)
        assert near > 30 * group.count, f"{near} pixels of {group.colour} for {group.count} {kind}"
