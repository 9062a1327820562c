"""The table that a run ends with in the terminal."""

from smolvlm_exp.reporting.summary import print_results

RESULT = {
    "held_out_rows": 240,
    "before": {"preference_accuracy": 0.683, "chair_s": 0.584, "mean_length": 13.0},
    "after": {"preference_accuracy": 0.954, "chair_s": 0.6, "mean_length": 13.0, "reward_accuracy": 0.9},
    "intervals": {"before": {}, "after": {"reward_accuracy": (0.86, 0.94)}},
    "changes": {
        "preference_accuracy": {"difference": 0.271, "low": 0.213, "high": 0.333, "p": 0.0005},
        "chair_s": {"difference": 0.016, "low": -0.02, "high": 0.05, "p": 0.4},
        "mean_length": {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0},
    },
    "checks": [
        {"id": "a", "name": "moved", "value": 1.0, "threshold": ">= 1", "verdict": "ok", "detail": ""},
        {"id": "b", "name": "drop", "value": 0.25, "threshold": "<= 0.1", "verdict": "warn", "detail": "rejected too"},
    ],
}


def printed(capsys, **changes):
    print_results({**RESULT, **changes})
    return " ".join(capsys.readouterr().out.split())


def test_words_percent_and_which_way_is_better(capsys):
    text = printed(capsys)
    assert "┃ 240 held-out rows ┃ before ┃ after ┃ change ┃ 95 % CI ┃" in text
    assert "Preference accuracy ↑ │ 68.3 % │ 95.4 % │ +27.1 points │ +21.3 to +33.3, p < 0.001 │" in text
    assert "that is not there ↓ │ 58.4 % │ 60.0 % │ +1.6 points │ \u22122.0 to +5.0, p = 0.400 │" in text
    assert "Reward accuracy ↑ │ │ 90.0 % │ │ 86.0 % to 94.0 % │" in text
    assert "Mean answer length │ 13 │ 13 │ no change │" in text
    assert "↑ more is better, ↓ less is better" in text
    assert "1 of 2 checks passed warn drop: 0.25 (should be <= 0.1); rejected too" in text
    assert "moved" not in text
    assert "no gain" not in text.lower()


def test_what_the_rows_do_not_show_is_said(capsys):
    assert "4 held-out rows: too few to tell." in printed(capsys, held_out_rows=4)
    chance = {"chair_s": RESULT["changes"]["chair_s"]}
    assert "No gain over before." in printed(capsys, changes=chance)
    print_results({**RESULT, "changes": chance}, ("tuned", "exported"), tuned=False)
    assert "no gain" not in capsys.readouterr().out.lower()  # an export is to be as good, no better
    assert "2 checks passed" in printed(capsys, checks=[RESULT["checks"][0]] * 2)


def test_what_changed_by_more_than_chance_has_colour(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = printed(capsys)
    assert "\x1b[32m+27.1" in text
    assert "+1.6" in text
    assert "\x1b[32m+1.6" not in text
