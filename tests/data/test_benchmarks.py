"""POPE's, AMBER's and COCO's files: read as they are published, scored by task=evaluate, refused where malformed."""

import json
import shutil
from importlib import import_module

import pytest

from smolvlm_exp.data.preferences import load_preferences, load_rows
from smolvlm_exp.data.sources.photos import FOLDER as PHOTOS
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose

POPE = [
    {"question_id": 1, "image": "cat.jpg", "text": "Is there a cat in the image?", "label": "yes"},
    {"question_id": 2, "image": "cat.jpg", "text": "Is there a car in the image?", "label": "no"},
    {"question_id": 3, "image": "horse.jpg", "text": "Is there a dog in the image?", "label": "no"},
]
QUERIES = [
    {"id": 1, "image": "cat.jpg", "query": "Describe this image."},
    {"id": 1005, "image": "cat.jpg", "query": "Is the cat black in this image?"},
]
ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["cat", "sofa"], "hallu": ["dog", "window"]},
    {"id": 1005, "type": "discriminative-attribute-state", "truth": "no"},
]
RELATED = {"cat": [], "sofa": ["couch"], "dog": [], "window": ["glass"]}
INSTANCES = {
    "images": [{"id": 7, "file_name": "cat.jpg"}, {"id": 8, "file_name": "not_downloaded.jpg"}],
    "categories": [{"id": 17, "name": "cat"}, {"id": 63, "name": "couch"}, {"id": 18, "name": "dog"}],
    "annotations": [{"image_id": 7, "category_id": 17}, {"image_id": 7, "category_id": 17}],
}
CAPTIONS = {"annotations": [{"image_id": 7, "caption": "A kitty lies on a sofa, as if it were a baby cat."}]}
SYNONYMS = "cat, kitten, kitty\ncouch, sofa\ndog, puppy\nperson, baby\n"


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES = {
    "pope.json": lines(POPE), "AMBER/annotations.json": json.dumps(ANNOTATIONS, indent=4),
    "AMBER/relation.json": json.dumps(RELATED), "AMBER/safe_words.txt": "sign\nlight",
    "AMBER/query/query_all.json": json.dumps(QUERIES, indent=4), "instances.json": json.dumps(INSTANCES),
    "captions.json": json.dumps(CAPTIONS), "synonyms.txt": SYNONYMS,
}  # fmt: skip
SETTINGS = {
    "pope": {"questions": "pope.json", "images": "photos"},
    "amber": {"folder": "AMBER", "images": "photos"},
    "coco": {"annotations": "instances.json", "images": "photos"},
}
AS_PUBLISHED = {"synonyms": "synonyms.txt", "captions": "captions.json"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """All files as a person would download them, in the working folder."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "photos").mkdir()
    for name in ("cat.jpg", "horse.jpg"):
        shutil.copy(PHOTOS / name, tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(name, **more):
    source = import_module(f"smolvlm_exp.data.sources.{name}")
    return source, source.Config(**{"source": name, **SETTINGS[name], **more})


def truths(name, split="test", **more):
    source, config = config_of(name, **more)
    return [json.loads(truth) for truth in source.load(config, split)["truth"]]


def test_truths(files):
    assert [truth["answer"] for truth in truths("pope")] == ["yes", "no", "no"]
    assert len(truths("pope", "test[:2]")) == 2
    assert truths("amber") == [
        {"kind": "caption", "objects": ["cat", "sofa"], "expected": ["dog", "window"]},
        {"kind": "yes_no", "answer": "no", "positive": "no"},
    ]
    assert truths("coco") == [{"kind": "caption", "objects": ["cat"]}]  # the image that is there, the cats as one
    published = truths("coco", **AS_PUBLISHED)
    assert published == [{"kind": "caption", "objects": ["cat", "couch"]}]  # a baby cat is no person


def test_a_missing_image_is_its_rows_problem(files, processor):
    (files / "photos" / "horse.jpg").unlink()
    with pytest.raises(RequestError, match=r"test row 2: the image is not there: horse\.jpg"):
        load_preferences(config_of("pope")[1], processor, files, splits=("test",))


MALFORMED = {
    "no JSON": ("pope", "pope.json", lines(POPE[:1]) + "{oops\n", r"pope\.json line 2 is not JSON"),
    "no such key": ("pope", "pope.json", "\n" + lines([{"image": "a.jpg", "text": "?"}]), r"line 2: .*no such label"),
    "another label": ("pope", "pope.json", lines([{**POPE[0], "label": "maybe"}]), r"line 1: label is 'maybe'"),
    "no line": ("pope", "pope.json", "", r"pope\.json is empty"),
    "no object": ("amber", "AMBER/query/query_all.json", "[1]", r"query_all\.json entry 1 is int, not an object"),
    "no annotation": ("amber", "AMBER/annotations.json", json.dumps(ANNOTATIONS[:1]), r"entry 2: id 1005 is not in"),
    "another truth": ("amber", "AMBER/annotations.json", json.dumps([ANNOTATIONS[0], {**ANNOTATIONS[1], "truth": 3}]),
                      r"annotations\.json entry 2: truth is 3; expected yes or no"),
    "no part": ("coco", "instances.json", "{}", r"instances\.json: .*no such images"),
    "no category": ("coco", "instances.json", json.dumps({**INSTANCES, "categories": []}),
                    r"annotations, entry 1: there is no category 17"),
    "no synonym": ("coco", "synonyms.txt", "cat\n", r"data\.synonyms=synonyms\.txt has no line with couch"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "file", "text", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_named_with_its_line(files, name, file, text, message):
    (files / file).write_text(text)
    with pytest.raises(RequestError, match=message):
        truths(name, **(AS_PUBLISHED if name == "coco" else {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": "pope2.json"}, r"data\.questions: pope2\.json cannot be read: No such file"),
        ({"images": "nowhere"}, r"data\.images=nowhere: there is no such folder"),
        ({"split": "train"}, "not training"),
    ],
)
def test_a_request_that_cannot_work(files, change, message):
    with pytest.raises(RequestError, match=message):
        truths("pope", **change)


def test_questions_without_answers_are_not_trained_on(files):
    """Except by what learns from scores."""
    config = config_of("pope", train="test")[1]
    with pytest.raises(RequestError, match=r"data\.train=test: .* without preferred answers.*trainer=grpo.*task=mine"):
        load_rows(config, "train")
    assert len(load_rows(config, "train", answers=False)) == 3


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_are_scored(files, name, monkeypatch):
    """All of task=evaluate, except that the answers are made up, so that the numbers are known."""
    from peft import get_peft_model

    from smolvlm_exp.engine.generation.sampling import Sampling
    from smolvlm_exp.evaluation import held_out
    from smolvlm_exp.models.adapter import lora_config
    from smolvlm_exp.models.model import load_model
    from smolvlm_exp.tasks.evaluate import evaluate

    settings = {**SETTINGS[name], **(AS_PUBLISHED if name == "coco" else {})}
    overrides = [f"data.{key}={value}" for key, value in settings.items()]
    config = compose("task=evaluate", "quant=none", "tracker=none", f"data={name}", *overrides)
    tuned = get_peft_model(load_model(config.model), lora_config(config.adapter, quantised=False))
    tuned.save_pretrained("run/adapter")
    config.model.adapter = "run"
    generate, with_adapter = held_out.generate_answers, []

    def answers(model, processor, rows, sampling, *args):
        assert len(generate(model, processor, rows, Sampling(2), *args)) == len(rows)
        with_adapter.append(hasattr(model, "peft_config"))
        yes_no, caption = (("Yes.", "A dog on a couch."), ("No.", "A cat on a sofa."))[with_adapter[-1]]
        questions = [row["prompt"][0]["content"][1]["text"] for row in rows]
        return [yes_no if question.startswith("Is") else caption for question in questions]

    monkeypatch.setattr(held_out, "generate_answers", answers)
    monkeypatch.setattr("smolvlm_exp.tasks.evaluate.generation_speed", lambda *args: [])
    summary = evaluate(config, files)
    assert with_adapter == [False, True]
    before, after = summary["before"], summary["after"]
    if name == "pope":  # truth yes, no, no
        assert (before["yes_no_accuracy"], after["yes_no_accuracy"]) == pytest.approx((1 / 3, 2 / 3))
        assert (before["yes_no_f1"], after["yes_no_f1"]) == pytest.approx((2 / 4, 0))
        assert (before["yes_ratio"], after["yes_ratio"]) == (1, 0)
    else:
        assert (before["chair_i"], before["recall"]) == (1 / 2, 1 / 2)
        assert (after["chair_s"], after["recall"]) == (0, 1)
    if name == "amber":
        assert (before["cog"], after["cog"], before["no_f1"], after["no_f1"]) == (1 / 2, 0, 0, 1)
    (check,) = summary["checks"]
    assert (check["id"], check["verdict"]) == ("answers_changed", "ok")
    assert summary["changes"].keys() == before.keys() == after.keys()
    page = (files / "report.html").read_text()
    assert "<dt>Truth</dt>" in page
    assert "<dt>Chosen</dt>" not in page
    assert ("<mark>dog</mark>" in page) == (name != "pope")
