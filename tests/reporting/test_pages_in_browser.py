"""The pages in a real browser, on a phone and on a desk: nothing is cut off, tables sort and copy, nothing fails."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from smolvlm_exp.data.messages import user
from smolvlm_exp.evaluation.answer_changes import AnswerChange, save_answers
from smolvlm_exp.evaluation.comparison import Run, compare_runs
from smolvlm_exp.reporting.comparison_page import comparison_page
from smolvlm_exp.reporting.mining_page import Example, mining_page
from smolvlm_exp.reporting.report import CURVES, write_report
from smolvlm_exp.reporting.summary import save_images
from smolvlm_exp.rewards.pairs import ScoredAnswer
from smolvlm_exp.sweep.sweep_page import write_page
from tests.reporting.test_report import CONFIG, SUMMARY, sample, write_log
from tests.sweep.test_results import grid, made

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDE = """[...document.querySelectorAll("body *")]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5
        || (e.matches(".scroll, pre, td, th, dd, h3") && e.scrollWidth > e.clientWidth + 1))
    .filter((e) => !e.closest("svg, .spoken")).map((e) => e.outerHTML.slice(0, 200))"""
METRICS = dict.fromkeys(("preference_accuracy", *SUMMARY["after"], "yes_no_accuracy", "yes_no_f1", "yes_ratio"), 0.5)


def write_run(folder: Path, rate: str, value: float) -> Run:
    """A run with answers and curves."""
    folder.mkdir()
    write_log(folder, *({"step": step, "loss": value / step, "rewards/chosen": value} for step in range(1, 40)))
    hard = sample("A small red star and a Moon.", verdict="worse")
    save_images(folder, [hard])
    after = f"A star at {rate}."
    save_answers(folder, [AnswerChange(0, "ab", hard.question, {"truth": "star"}, "A moon.", after, (1, 0))])
    intervals = {"after": dict.fromkeys(METRICS, (0.4, 0.6))}  # with ±, values are as wide as they get
    summary = {**SUMMARY, "after": METRICS | {"preference_accuracy": value}, "intervals": intervals}
    write_report(folder, summary, CONFIG, [hard, sample("A star.", verdict="same")])
    return Run(
        folder, {"trainer.learning_rate": rate, "adapter.target": "a_regex_that_is_rather_long" * 3 + rate}, summary
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / name, name, value) for name, value in (("1e-5", 0.9), ("0.001", 0.6), ("0.0005", 0.75))]
    older = write_run(folder / "0.1", "0.1", 0.3)  # of a release that kept no answers
    (older.folder / "answers.jsonl").unlink()
    (folder / "compare.html").write_text(comparison_page(compare_runs([*runs, older], None), folder))
    jobs = {(r, rate, "0"): 0.5 + 0.1 * i for i, (r, rate) in enumerate([("8", "1e-3"), ("16", "1e-3"), ("8", "5e-3")])}
    (folder / "sweep").mkdir()
    write_page(made(folder / "sweep", grid(jobs)))
    answers = [
        ScoredAnswer(text, score, -0.1, 5, True, {"objects": score}) for text, score in (("A star.", 1.0), ("A", 0.0))
    ]
    row = {"images": [sample().image], "prompt": [user("What?")], "truth": json.dumps({"kind": "number", "answer": 2})}
    mined = SUMMARY | {
        "rows": 2, "rows_with_pairs": 1, "pairs": 1, "answers": 4, "cut": 0, "taught_nothing": {"same_score": 1},
        "reward": {"all_mean": 0.5}, "rewards": {"objects": 0.5}, "seconds": 3.0,
    }  # fmt: skip
    make = partial(Example, row, answers, words=None)
    shown = [make([(0, 1)], ""), make([], "same_score")]
    page = mining_page(folder, mined, CONFIG, {"all": [0.0, 1.0]}, shown[:1], shown[1:])
    (folder / "mining.html").write_text(page)
    return {
        "report": folder / "1e-5" / "report.html", "compare": folder / "compare.html",
        "sweep": folder / "sweep" / "sweep.html", "mining": folder / "mining.html",
    }  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        wrong: list[str] = []
        page = started.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))  # what a policy forbids appears there
        yield SimpleNamespace(page=page, wrong=wrong)
        started.close()


def test_a_comparison_of_many_long_runs_stays_small(tmp_path):
    keys = [key for curves in CURVES.values() for _, lines, _ in curves for key in lines.values()]
    hard = [replace(sample(image=Image.effect_noise((880, 660), 80)), row=row) for row in range(12)]
    save_images(tmp_path, hard)
    runs = []
    for i in range(12):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_log(folder, *({"step": s, **{key: math.sin(s * i + len(key)) for key in keys}} for s in range(400)))
        shutil.copy(tmp_path / "images.json", folder)
        lines = [AnswerChange(row, f"{row}", "Q", {}, "A", f"B {i}", None) for row in range(12)]
        save_answers(folder, lines)
        runs.append(Run(folder, {"adapter.r": str(i)}, {**SUMMARY, "after": METRICS}))
    page = comparison_page(compare_runs(runs, None), tmp_path)
    assert page.count("<img ") == 12
    assert len(page.encode()) < 1_500_000


@pytest.mark.parametrize("name", ["report", "compare", "sweep", "mining"])
def test_nothing_is_cut_off_and_nothing_fails(name, pages, browser):
    for width in (390, 1400):
        for scheme in ("light", "dark"):
            browser.page.emulate_media(color_scheme=scheme)
            browser.page.set_viewport_size({"width": width, "height": 900})
            browser.page.goto(pages[name].as_uri())
            assert browser.page.evaluate(WIDE) == [], width
            assert browser.page.evaluate("document.documentElement.scrollWidth") <= width
    assert pages[name].stat().st_size < 1_500_000
    assert browser.wrong == []


def test_tables_sort_by_number_and_are_copied(pages, browser):
    page = browser.page
    page.goto(pages["compare"].as_uri())
    rates = page.locator("#table tbody td:first-child")
    head = page.locator("#table th").first
    assert rates.all_inner_texts() == ["1e-5", "0.0005", "0.001", "0.1"]  # as the metric has them
    for order, expected in (
        ("ascending", ["1e-5", "0.0005", "0.001", "0.1"]),
        ("descending", ["0.1", "0.001", "0.0005", "1e-5"]),
    ):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        assert rates.all_inner_texts() == expected
    page.locator("#table th button", has_text="Difference to best").click()
    assert rates.all_inner_texts() == ["0.1", "0.001", "0.0005", "1e-5"]  # the best has no difference, and comes last
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.locator("#table .copy").click()
    first, second, *_ = page.evaluate("copied").split("\n")
    assert first.startswith("learning_rate\ttarget\tRuns\tVerdict\tDifference to best\tPreference accuracy ↑\t")
    assert second.split("\t")[0] == "0.1"
    assert browser.wrong == []


def test_answers_are_side_by_side(pages, browser):
    browser.page.set_viewport_size({"width": 1400, "height": 900})
    browser.page.goto(pages["compare"].as_uri())
    answers = browser.page.locator(".versus .answers > div")
    assert [text.split("\n")[-1] for text in answers.all_inner_texts()] == [
        "A moon.", "A star at 1e-5.", "A star at 0.0005.", "A star at 0.001.",
    ]  # fmt: skip
    assert len({answers.nth(i).bounding_box()["y"] for i in range(4)}) == 1
    assert browser.page.locator("#curves .legend").count() == 1
    assert browser.page.locator(".versus img").first.get_attribute("alt") == "An image of a star"
