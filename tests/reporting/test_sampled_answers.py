"""What is shown of the answers that a model was trained on."""

from PIL import Image

from smolvlm_exp.reporting.sampled_answers import best_first, completions_table, sampled_groups, spread


def event(step, *rewards):
    answers = [{"text": f"{step}{i}", "reward": sum(r.values()), "rewards": r} for i, r in enumerate(rewards)]
    return {"step": step, "row": step % 3, "question": "What is it?", "answers": answers}


def test_a_card_has_the_best_answer_first_with_each_reward():
    rows = [{"images": [Image.new("RGB", (8 + i, 8))]} for i in range(3)]
    events = [event(4, {"objects": -1.0, "yes_no": 0.25}, {"objects": 2.0}, {})]
    (group,) = sampled_groups(rows, events)
    card = group.card()
    assert card["image"]["width"] == 9  # of row 1
    assert card["question"] == "Step 4: What is it?"
    assert card["lines"] == [
        ("Reward 2: objects 2", "41", "model"),
        ("Reward 0", "42", "model"),
        ("Reward \u22120.75: objects \u22121, yes no 0.25", "40", "model"),
    ]
    assert [answer["text"] for answer in events[0]["answers"]] == ["40", "41", "42"]  # the log is left as it is


def test_answers_that_earn_the_same_keep_their_order():
    answers = event(1, {"a": 1.0}, {"a": 1.0})["answers"]
    assert best_first(answers) == answers


def test_groups_are_spread_over_the_run():
    assert spread(range(100), 6) == [0, 20, 40, 59, 79, 99]
    assert spread([1, 2], 6) == [1, 2]
    assert spread([], 6) == []


def test_the_table_has_a_column_for_each_reward():
    columns, rows = completions_table([event(1, {"objects": 1.0}), event(2, {"yes_no": 0.5, "objects": 0.0})])
    assert columns == ["step", "question", "answer", "reward", "reward/objects", "reward/yes_no"]
    assert rows == [[1, "What is it?", "10", 1.0, 1.0, None], [2, "What is it?", "20", 0.5, 0.0, 0.5]]
    assert completions_table([]) == (["step", "question", "answer", "reward"], [])


def test_the_table_keeps_whole_groups_within_its_limit():
    events = [event(step, *[{"a": 1.0}] * 8) for step in range(3000)]
    _, rows = completions_table(events)
    assert len(rows) == 10_000
    assert (rows[0][0], rows[-1][0]) == (0, 2999)
