"""TRL's completions and prompts in each of the forms they come in."""

from smolvlm_exp.rewards.completions import of_kind, questions, texts
from tests.rewards.rows import known, said


def test_texts_of_strings_messages_and_parts():
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "A moon."}]}]
    assert texts(["A star.", *said("A ring."), parts]) == ["A star.", "A ring.", "A moon."]


def test_the_question_is_what_the_user_said_last():
    image, text = {"type": "image", "text": None}, {"type": "text", "text": "Which?"}
    turns = [{"role": "user", "content": "What?"}, *said("A star.")[0], {"role": "user", "content": [image, text]}]
    assert questions([turns, "How many?", said("alone")[0]]) == ["Which?", "How many?", ""]


def test_rows_of_another_kind_and_without_truth_are_none():
    number = {"kind": "number", "answer": 2}
    assert of_kind(known(number, {"kind": "yes_no", "answer": "no"}, None), "number") == [number, None, None]
