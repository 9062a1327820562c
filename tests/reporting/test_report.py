"""report.html shows the run's numbers, stands alone, and never runs what an answer says."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from smolvlm_exp.reporting.charts import MAX_POINTS, line_chart, thin, ticks
from smolvlm_exp.reporting.html import highlight, highlight_changes
from smolvlm_exp.reporting.report import CURVES, deciding_settings, write_report
from smolvlm_exp.reporting.results import headline, result_rows
from smolvlm_exp.reporting.summary import Sample
from smolvlm_exp.runs.event_log import read_events
from smolvlm_exp.utils.formatting import as_finite, number, percent

SUMMARY: dict[str, Any] = {
    "status": "done",
    "seed": 20240101,
    "settings": {"model": "tiny", "quant": "nf4", "adapter": "dora", "data": "shapes", "trainer": "dpo"},
    "before": {"chair_s": 0.571, "recall": 0.9954, "preference_accuracy": 0.4125, "mean_length": 13.4},
    "after": {
        "chair_s": 0.2413, "recall": 0.9861, "preference_accuracy": 0.9208, "mean_length": 11.9,
        "reward_accuracy": 0.9458, "preference_margin": 3.612,
    },
    "train": {
        "steps": 60, "seconds": 41.37, "pairs_per_second": 37.9, "memory_peak_gib": 0.352, "first_loss": 0.6931,
        "last_loss": 0.1473, "trainable_parameters": 11269248, "total_parameters": 2257542128,
    },
    "checks": [
        {"id": "a", "name": "recall drop", "value": 0.0093, "threshold": "<= 0.02", "verdict": "ok", "detail": ""},
        {"id": "b", "name": "CHAIR_s", "value": 0.61, "threshold": "<= 0.5", "verdict": "fail", "detail": "by 0.1"},
    ],
    "seconds_by_phase": {"startup": 9.0, "training": 60.0, "other": 0.5},
    "versions": {"smolvlm_exp": "0.1.0", "torch": "2.13.0+cpu"},
}  # fmt: skip
CONFIG = {"model": {"name": "tiny"}, "trainer": {"beta": 0.1, "loss_type": ["sigmoid"]}}


def sample(before: str = "A star and a Moon.", **changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "row": 0,
        "image": Image.new("RGB", (128, 64), "navy"),
        "alt": "An image of a star",
        "question": "What do you see?",
        "answers": {"Before": before, "After": "A star."},
        "hallucinated": {"Before": ["moon"], "After": []},
        "references": {"Chosen": "A star.", "Rejected": "A star and a moon."},
    }
    return Sample(**{**fields, **changes})


def write_log(folder: Path, *events: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def report(folder: Path, summary: dict[str, Any] = SUMMARY, samples: list[Sample] | None = None) -> str:
    write_report(folder, summary, CONFIG, [sample()] if samples is None else samples)
    return (folder / "report.html").read_text(encoding="utf-8")


class StrictParser(HTMLParser):
    """Fails on a tag that is left open or closed twice; notes what a browser would load or run."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs), attrs
        loading = ("src", "href", "data", "action", "srcset", "poster")
        self.loads += [value or "" for name, value in attrs if name in loading]

    def handle_endtag(self, tag: str) -> None:  # also called for <br/>
        if tag not in self.VOID:
            assert self.open.pop() == tag


def row(text: str, label: str) -> str:
    """The table row that has this label."""
    return next(r for r in re.findall(r"<tr.*?</tr>", text, flags=re.DOTALL) if label in r)


def test_the_page_loads_nothing_and_runs_its_own_script_alone(tmp_path: Path) -> None:
    write_log(tmp_path, {"step": 1, "loss": 0.69}, {"step": 2, "loss": 0.5})
    text = report(tmp_path)
    page = StrictParser(text)
    assert all(load.startswith(("#", "data:image/")) for load in page.loads)
    assert not {"link", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"@import|url\(", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}';" in text


def test_the_page_shows_the_numbers(tmp_path: Path) -> None:
    text = report(tmp_path)
    sections = re.findall(r'<section id="(\w+)"', text)
    assert sections == ["results", "samples", "checks", "curves", "speed", "phases", "config", "versions", "reproduce"]
    for shown in (
        "57.1\u00a0%", "24.1\u00a0%", "41.4 s", "0.352 GiB", "11,269,248 of 2,257,542,128 (0.50\u00a0%)",
        "20240101",  # a seed is a name, not a quantity
        "1 of 2 checks failed", "recall drop", "CHAIR_s<small>by 0.1</small>", "&lt;= 0.5", "<dt>smolvlm_exp</dt>",
        "<dt>training steps</dt><dd>1 min 00 s (86\u00a0%)</dd>",
        "2.13.0+cpu", "loss_type:\n  - sigmoid",
    ):  # fmt: skip
        assert shown in text
    assert "(better)" in row(text, "CHAIR_s, lower")  # not by colour alone
    assert "(worse)" in row(text, "recall, higher")
    only_after = row(text, "Reward accuracy")
    assert "94.6\u00a0%" in only_after
    assert "neutral" in only_after
    assert "points" not in only_after


@pytest.mark.parametrize(
    ("key", "before", "after", "tone", "arrow", "change"),
    [
        ("chair_s", 0.5, 0.25, "better", "↓", "\u221225.0\u00a0points"),
        ("chair_i", 0.1, 0.2, "worse", "↑", "+10.0\u00a0points"),
        ("recall", 0.99, 0.98, "worse", "↓", "\u22121.0\u00a0points"),
        ("preference_accuracy", 0.4, 0.9, "better", "↑", "+50.0\u00a0points"),
        ("yes_no_accuracy", 0.9, 0.9, "neutral", "", "no change"),
        ("mean_length", 13.5, 12.0, "neutral", "↓", "\u22121.5"),
        ("yes_ratio", 0.5, 0.6, "neutral", "↑", "+10.0\u00a0points"),
        ("a_new_metric", 1.0, 2.0, "neutral", "↑", "+1"),
    ],
)
def test_each_metric_has_its_good_direction(key, before, after, tone, arrow, change) -> None:
    (line,) = result_rows({key: before}, {key: after}, {})
    assert (line.tone, line.arrow, line.change) == (tone, arrow, change)


def test_a_change_has_its_interval_and_p() -> None:
    change = {"chair_s": {"difference": -0.5, "low": -0.59, "high": 0.02, "p": 0.0004998}}
    (line,) = result_rows({"chair_s": 0.6}, {"chair_s": 0.1}, change)
    assert line.interval == "\u221259.0 to +2.0, p\u00a0<\u00a00.001"
    assert line.tone == "neutral"  # its interval holds zero
    (line,) = result_rows({"recall": 0.5}, {"recall": 0.6}, {"recall": {"low": 0, "high": 0.1, "p": 0.25}})
    assert line.interval.endswith("p\u00a0=\u00a00.250")


def test_the_settings_that_decide_come_first(tmp_path: Path) -> None:
    config = {
        "adapter": {"r": 8, "lora_alpha": 16}, "trainer": {"learning_rate": 1e-4, "beta": 0.2}, "name": "mine",
    }  # fmt: skip
    known = {
        **SUMMARY, "train": {**SUMMARY["train"], "batch_size": 32}, "seconds": 90.0,
        "hardware": {"device": "NVIDIA H200", "dtype": "bfloat16"},
        "data": {"train": {"rows": 6400}, "test": {"rows": 240}},
        "sources": {
            "model": {"id": "a/b", "commit": "1234567890", "license": "mit"},
            "data": {"id": "shapes", "commit": None, "license": "apache-2.0"},
            "code": {"id": "smolvlm_exp 0.1.0", "commit": "abcdef0123", "license": "apache-2.0"},
        },
    }  # fmt: skip
    decide = [(name, value) for name, value in deciding_settings(known, config) if value is not None]
    assert decide == [
        ("model", "tiny: a/b at 12345678 (mit)"), ("data", "shapes (apache-2.0)"), ("trainer", "dpo"),
        ("adapter", "dora"), ("rank", 8), ("alpha", 16), ("quant", "nf4"), ("learning rate", 1e-4), ("beta", 0.2),
        ("batch size", 32), ("steps", 60), ("training rows", "6,400"), ("held-out rows", "240"), ("seed", 20240101),
        ("device", "NVIDIA H200"), ("dtype", "bfloat16"), ("code", "smolvlm_exp 0.1.0 at abcdef01 (apache-2.0)"),
        ("time of training", "41.4 s"), ("total time", "1 min 30 s"),
    ]  # fmt: skip
    write_report(tmp_path, known, config, [])
    text = (tmp_path / "report.html").read_text()
    assert text.index("<dt>learning rate</dt>") < text.index("<nav")
    assert dict(deciding_settings({**known, "settings": {}}, config))["model"] == "a/b at 12345678 (mit)"
    evaluated = dict(deciding_settings({"seed": 0, "settings": {"task": "evaluate"}}, config))
    assert {name for name, value in evaluated.items() if value is not None} == {"task", "rank", "alpha", "seed"}


def test_headline() -> None:
    assert headline(SUMMARY) == (
        "Captions with an object that is not there: 57\u00a0% → 24\u00a0%; preference accuracy: 41\u00a0% → 92\u00a0%."
    )
    sft = {"status": "stopped", "train": {"first_loss": 2.5, "last_loss": 0.42}}
    assert headline(sft) == "The run was stopped before its end. Training loss: 2.5 → 0.42."
    assert headline({"status": "done", "after": {"recall": 0.9}}) == "Objects in the image that are named: 90\u00a0%."
    rewarded = {"status": "done", "before": {"reward": 0.31}, "after": {"reward": 0.62}}
    assert headline(rewarded) == "Reward: 0.31 → 0.62."
    assert headline({"status": "done"}) == "Nothing was measured."
    assert headline({**SUMMARY, "held_out_rows": 8}) == "8 held-out rows: too few to tell."
    chance = {"chair_s": {"low": -0.4, "high": 0.1}, "preference_accuracy": {"low": -0.1, "high": 0.6}}
    assert headline({**SUMMARY, "changes": chance}).startswith("No gain over before. Captions with an object")


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "</pre></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\ud800"  # nor is it all UTF-8
    check = {"name": evil, "value": 1.0, "threshold": evil, "verdict": evil, "detail": evil}
    summary = {
        **SUMMARY, "status": evil, "seed": evil, "settings": {evil: evil}, "before": {evil: 1.0}, "after": {evil: 1.0},
        "checks": [check], "versions": {evil: evil}, "advice": [evil],
    }  # fmt: skip
    answers, words = {evil: evil, "After": evil}, {evil: ["script", "<"], "After": []}
    hurt = sample(question=evil, answers=answers, hallucinated=words, references={evil: evil})
    folder = tmp_path / "a <b> 'run' & more"
    folder.mkdir()
    write_report(folder, summary, {"name": evil, evil: evil}, [hurt], [hurt])
    page = StrictParser((folder / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1
    assert page.tags.count("img") == 2
    StrictParser(line_chart({evil: [(0, 1), (1, 2)], "b": [(0, 1)]}, evil, x_label=evil, reference=(evil, 1.5)))


@pytest.mark.parametrize(
    ("text", "words", "marked"),
    [
        ("A Moon, two moons, moonlight.", ["moon"], "A <mark>Moon</mark>, two <mark>moons</mark>, moonlight."),
        ("a red star & star", ["red star", "star"], "a <mark>red star</mark> &amp; <mark>star</mark>"),
        ("<b>", [], "&lt;b&gt;"),
    ],
)
def test_complete_words_are_marked_in_any_case_and_in_the_plural(text, words, marked) -> None:
    assert highlight(text, words) == marked


def test_images_are_embedded_small(tmp_path: Path) -> None:
    noise = Image.effect_noise((3000, 2000), 80)
    photo = Image.linear_gradient("L").resize((3000, 2000))
    shown = [noise, photo, noise.resize((256, 256)), Image.new("RGBA", (40, 90)), Image.new("RGB", (128, 64), "navy")]
    text = report(tmp_path, samples=[sample(image=image) for image in shown])
    assert text.count("data:image/png;base64,") == 2
    assert text.count("data:image/jpeg;base64,") == 3
    sizes = re.findall(r'<img width="(\d+)" height="(\d+)"', text)
    assert sizes[1:] == [("880", "587"), ("256", "256"), ("40", "90"), ("128", "64")]
    assert int(sizes[0][0]) < 880  # as many bytes as another of that size would take
    assert noise.size == (3000, 2000)  # the caller's image is unchanged


def test_the_largest_page_is_below_a_megabyte_and_a_half(tmp_path: Path) -> None:
    """All rows photos of noise, and a log of every quantity, longer than a chart shows."""
    keys = [key for curves in CURVES.values() for _, lines, _ in curves for key in lines.values()]
    numbered = list(enumerate(keys, start=1))
    write_log(tmp_path, *({"step": s, **{key: math.sin(s * i) for i, key in numbered}} for s in range(1000)))
    hard = sample(image=Image.effect_noise((880, 660), 80))
    write_report(tmp_path, SUMMARY, CONFIG, [hard] * 12, [hard] * 4, [hard] * 6)  # type: ignore[list-item]
    assert len((tmp_path / "report.html").read_bytes()) < 1_500_000


def test_what_got_worse_is_marked_where_it_differs(tmp_path: Path) -> None:
    changed = sample("A small red star and a Moon.", alt="An image of a star", verdict="worse")
    same = sample("A star.", verdict="same")
    text = report(
        tmp_path, {**SUMMARY, "answer_changes": {"worse": 3, "better": 0, "changed": 1, "same": 36}}, [changed, same]
    )
    assert "<dd>A <del>small red </del>star<del> and a <mark>Moon</mark></del>.</dd>" in text
    assert "<dt>Both</dt><dd>A star.</dd>" in text
    assert 'alt="An image of a star"' in text
    assert "Of 40 answers 3 got worse, 0 better; 1 changed otherwise and 36 are the same" in text
    assert highlight_changes("a cat", "two cats") == ("<del>a cat</del>", "<ins>two cats</ins>")


def test_curves(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = [
        {"step": s, "loss": 1 / s, "rewards/chosen": 0.1 * s, "rewards/rejected": -0.1 * s, "memory_peak_gib": 2.0}
        for s in range(1, 41)
    ]
    write_log(tmp_path, *events, {"step": 40, "eval_loss": 0.03, "unknown/key": "text"}, {"train_runtime": 3.0})
    text = report(tmp_path)
    figures = re.findall(r'<figure class="chart">.*?</figure>', text, flags=re.DOTALL)
    titles = [re.search(r'class="title">(.*?)<', figure).group(1) for figure in figures]  # type: ignore[union-attr]
    assert titles == ["Loss", "Rewards", "Peak memory, GiB"]
    assert "step 40  ·  training 0.025  ·  held-out 0.03" in figures[0]
    assert '<li class="s0">chosen</li><li class="s1">rejected</li>' in figures[1]
    assert "legend" not in figures[2]


def test_the_log_of_a_killed_and_resumed_run_is_read(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 2, "loss": 9.0}\n{"step": 1, "loss": 7.0}\n{"step": 2, "loss": 4.0}\n[1]\n{"step": 3, "lo')
    assert [(e["step"], e["loss"]) for e in read_events(log)] == [(1, 7.0), (2, 9.0), (2, 4.0)]
    text = report(tmp_path)
    assert "step 2  ·  4<" in text
    assert "step 2  ·  9<" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "stopped", "after": {}, "train": {**SUMMARY["train"], "first_loss": None, "last_loss": math.nan}},
        {"train": {}, "checks": [], "speed": {"base": [{"batch_size": 1, "first_token": 0.1, "tokens_per_second": 9.0,
                                                        "memory_peak_gib": None}]}},
    ],
    ids=["stopped", "task=evaluate"],
)  # fmt: skip
def test_runs_that_lack_something(tmp_path: Path, changes: dict[str, Any]) -> None:
    text = report(tmp_path, {**SUMMARY, **changes})
    StrictParser(text)
    assert ("There is no training log." in text) == bool(changes["train"])
    assert ('first token, s">0.1</td>' in text) == ("speed" in changes)


def test_values_that_are_not_finite_are_counted_not_drawn(tmp_path: Path) -> None:
    write_log(
        tmp_path, {"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf},
        {"step": 4, "loss": None, "grad_norm": math.nan}, {"step": 5, "loss": 10**400}, {"step": 6, "loss": 0.4},
    )  # fmt: skip
    text = report(tmp_path, {**SUMMARY, "train": {**SUMMARY["train"], "last_loss": math.nan}})
    assert "3 not finite" in text
    assert "<dd>nan</dd>" in text
    assert not any(word in points for points in re.findall(r'points="(.*?)"', text) for word in ("nan", "inf"))


def test_the_commands_run_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "my run"
    folder.mkdir(parents=True)
    text = report(folder)
    assert "--config-path &#39;outputs/my run/.hydra&#39; --config-name config" in text
    assert "resume=" not in text
    assert "resume=" in report(folder, {**SUMMARY, "status": "stopped"})


def test_numbers_are_written_for_people() -> None:
    written = {
        0.69314: "0.6931",
        5e-4: "5e\u22124",
        1234.0: "1,234",
        12.5: "12.5",
        -0.0: "0",
        -3.25: "\u22123.25",
        2e9: "2e9",
    }
    assert {value: number(value) for value in written} == written
    assert (number(math.nan), number(-math.inf)) == ("nan", "\u2212∞")
    assert (percent(0.5712), percent(-0.001), percent(0.98765, 1)) == ("57\u00a0%", "0\u00a0%", "98.8\u00a0%")
    assert [as_finite(value) for value in (True, "1", 3)] == [None, None, 3.0]


def test_ticks_are_round_and_enclose_the_values() -> None:
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(1, 60, 5, whole=True) == [0, 20, 40, 60]
    assert all(t == int(t) for t in ticks(1, 3, 5, whole=True))
    low, *_, high = ticks(-3.3, 0.7)
    assert low <= -3.3
    assert high >= 0.7


def test_a_spike_is_off_the_scale_and_does_not_flatten_the_rest() -> None:
    points = [(float(x), 1.0 + 0.1 * (x % 5)) for x in range(100)]
    chart = line_chart({"loss": [*points, (100.0, 5000.0)]}, "t")
    assert "1 off the scale" in chart
    assert "5,000" in chart  # under the pointer
    assert max(float(y) for y in re.findall(r'text-anchor="end">([\d.,]+)</text>', chart)) < 10
    assert "off the scale" not in line_chart({"loss": [*points[:10], (100.0, 50.0)]}, "t")  # too few to tell
    assert "off the scale" not in line_chart({"share": [*[(float(x), 1.0) for x in range(99)], (99.0, 0.5)]}, "t")


def test_every_line_s_value_is_under_the_pointer() -> None:
    chart = line_chart({f"r={i}": [(1, float(i)), (2, 5.0)] for i in range(5)}, "t")
    assert "<title>r=0 0\nr=1 1\nr=2 2\nr=3 3\nr=4 4</title>" in chart
    longer = line_chart({name: [(2.0 * x + odd, 1.0) for x in range(90)] for odd, name in enumerate("ab")}, "t")
    assert "step 0 to 1  ·  a 1  ·  b 1" in longer  # 180 steps share bands


def test_long_logs_are_thinned_and_keep_their_spikes() -> None:
    points = [(float(x), 1.0) for x in range(50_000)]
    points[31_234] = (31_234.0, 99.0)
    thinned = thin(points)
    assert len(thinned) <= MAX_POINTS
    assert {points[0], (31_234.0, 99.0), points[-1]} <= set(thinned)


@pytest.mark.parametrize(
    "points", [[(5, 0.0)], [(1, 2.0), (2, 2.0)], [(0, -1e-12), (1, 1e-12)], [(1, 1e90), (2, -1e90)]]
)
def test_charts_of_degenerate_series(points: list[tuple[float, float]]) -> None:
    chart = line_chart({"a": points}, "t")
    StrictParser(chart)
    assert "nan" not in chart
    assert "inf" not in chart
    assert line_chart({"a": [], "b": [(1, math.nan)]}, "t") == ""


def test_lines_of_one_group_share_a_colour_and_a_name() -> None:
    points = {name: [(1, float(i)), (2, 5.0)] for i, name in enumerate(("r=4 seed=0", "r=4 seed=1", "r=8"))}
    chart = line_chart(points, "t", alike={"r=4 seed=0": "r=4", "r=4 seed=1": "r=4"})
    assert '<li class="s0">r=4</li><li class="s1">r=8</li></ul>' in chart
    assert re.findall(r'polyline class="line (s\d)"', chart) == ["s0", "s0", "s1"]
    names = dict.fromkeys(points, "r=4") | {"r=8": "r=8"}
    alone = line_chart({**points, "r=4 seed=0": [], "r=4 seed=1": []}, "t", alike=names, legend=False)
    assert re.findall(r'polyline class="line (s\d)"', alone) == ["s1"]  # a colour is a group's in every chart
    assert "legend" not in alone


def test_comparing_runs_does_without_torch() -> None:
    module = "smolvlm_exp.reporting.comparison_page"
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'PIL'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
