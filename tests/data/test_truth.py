"""What people write about an image, as the truth that answers are scored by; and what they may not write."""

import json

import pytest

from smolvlm_exp.data.truth import image_text, read_truth, truth_of, truth_text, vocabulary_of

TEXTS = {  # a row's columns -> its truth, and that as a person reads it
    '{"answer": "Yes."}': ({"kind": "yes_no", "answer": "yes"}, "yes"),
    '{"answer": false}': ({"kind": "yes_no", "answer": "no"}, "no"),
    '{"answer": 0}': ({"kind": "number", "answer": 0}, "0"),
    '{"answer": " -2.5 "}': ({"kind": "number", "answer": -2.5}, "-2.5"),
    '{"answer": "007"}': ({"kind": "answer", "answer": "007"}, "007"),
    '{"answer": "A red star"}': ({"kind": "answer", "answer": "A red star"}, "A red star"),
    '{"answer": ["red", "pink", "red", 2]}': ({"kind": "answer", "answer": ["red", "pink", "2"]}, "red or pink or 2"),
    '{"answer": ["Yes", "yes."]}': ({"kind": "yes_no", "answer": "yes"}, "yes"),
    '{"answer": ["3", 3]}': ({"kind": "number", "answer": 3}, "3"),
    '{"objects": "Dog,  hot  dog,dog"}': ({"kind": "caption", "objects": ["dog", "hot dog"]}, "dog, hot dog"),
    '{"objects": ["dog"], "caption": "A dog."}': (
        {"kind": "caption", "objects": ["dog"], "caption": "A dog."}, "dog"),
    '{"answer": "2", "objects": ["dog"]}': ({"kind": "number", "answer": 2, "objects": ["dog"]}, "2"),
    '{"caption": " A dog. "}': ({"kind": "reference", "caption": "A dog."}, "A dog."),
    '{"truth": {"kind": "answer", "answer": "red", "objects": null}}': ({"kind": "answer", "answer": "red"}, "red"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), TEXTS.items(), ids=TEXTS)
def test_any_form(row, expected):
    truth, text = expected
    made = truth_of({"question": "?", **json.loads(row)})
    assert read_truth(made) == truth
    assert truth_of({"truth": made}) == made  # and it is read again as it is
    assert truth_text(made) == text


def test_nothing_known():
    empty = {"answer": None, "objects": [], "caption": "", "truth": None}
    assert (truth_of({}), truth_of(empty), read_truth(None), truth_text(None)) == (None, None, {}, "")


MALFORMED = [
    ({"answer": "  "}, "`answer` is empty"),
    ({"answer": {"text": "red"}}, "`answer` is .* not a text"),
    ({"answer": [["red"]]}, "`answer` is .* not a text"),
    ({"answer": float("nan")}, "a number is nan"),
    ({"answer": 10**400}, "which cannot be compared"),
    ({"objects": 3}, "expected a list of names"),
    ({"objects": ["dog", 3]}, "a name in `objects` is 3"),
    ({"objects": "dog,,cat"}, "a name in `objects` is empty"),
    ({"objects": ["犬"]}, "no letter from a to z"),
    ({"caption": ["A dog."]}, "`caption` is"),
    ({"truth": "red"}, "not JSON .*belongs in `answer`"),
    ({"truth": "[" * 100_000}, "not JSON"),
    ({"truth": "[1]"}, "expected an object"),
    ({"truth": {"kind": "colour", "answer": "red"}}, "kind 'colour'; known are"),
    ({"truth": {"kind": "yes_no", "answer": "maybe"}}, "no truth of kind yes_no"),
    ({"truth": {"kind": "number", "answer": "2"}}, "no truth of kind number"),
    ({"truth": {"kind": "number", "answer": True}}, "no truth of kind number"),
    ({"truth": {"kind": "answer", "answer": []}}, "no truth of kind answer"),
    ({"truth": {"kind": "answer"}}, "no truth of kind answer"),
    ({"truth": {"kind": "caption"}}, "no truth of kind caption"),
    ({"truth": {"kind": "caption", "objects": ["dog"], "phrases": [1]}}, "no truth of kind caption"),
    ({"truth": {"kind": "reference", "caption": " "}}, "`caption` of `truth` is empty"),
    ({"truth": {"kind": "answer", "answer": "red"}, "answer": "red"}, "it has `truth` and `answer`"),
]


@pytest.mark.parametrize(("row", "said"), MALFORMED, ids=[said for _, said in MALFORMED])
def test_what_is_malformed_is_named(row, said):
    with pytest.raises(ValueError, match=said):
        truth_of(row)


def test_the_vocabulary_of_rows():
    rows = [{"objects": "dog, cat"}, {"objects": ["hot dog"]}, {"answer": 2, "objects": ["bird"]}, {}]
    rows.append({"truth": {"kind": "caption", "objects": [], "expected": ["sofa"]}})
    words = vocabulary_of(map(truth_of, rows))
    named = [name for _, name in words("Two dogs, a bird and a hot dog on a sofa", {})]
    assert named == ["dog", "hot dog", "sofa"]
    assert vocabulary_of([None, truth_of({"answer": 2})]) is None


@pytest.mark.parametrize(
    ("truth", "text"),
    [
        ({"kind": "caption", "objects": ["star"], "phrases": ["two red stars", "a moon"]},
         "An image of two red stars, a moon"),
        ({"kind": "number", "answer": 2, "objects": ["star"]}, "An image of star"),
        ({"kind": "reference", "caption": "A dog."}, "An image: A dog."),
        ({"kind": "yes_no", "answer": "yes"}, "The image of the question: Is it?"),
        (None, "The image of the question: Is it?"),
    ],
)  # fmt: skip
def test_an_image_in_words(truth, text):
    assert image_text(truth and json.dumps(truth), "Is it?") == text
