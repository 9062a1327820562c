"""What the benchmarks' figures rest on: plain TRL's time, scaled from a sample, the rows, what a peer's case prints."""

import json

import pytest
from datasets import Dataset
from PIL import Image

from benchmarks import peer
from benchmarks.command import Finished, make_rows, phase_table
from benchmarks.peer_case import MODULES, Case
from benchmarks.plain_trl import Phase
from smolvlm_exp.models.shape import EMBEDDED


def test_a_phase_is_scaled_by_its_later_pieces():
    sampled = Phase("training", pieces=18, times=[30.0, 10.0, 14.0])
    assert sampled.seconds == 30 + 10 + 14 + 15 * 12
    assert Phase("log-probs", pieces=2, times=[3.0, 1.0]).seconds == 4
    assert Phase("answers", pieces=12, times=[5.0]).seconds == 60


@pytest.mark.parametrize(("times", "enough"), [([90.0], False), ([1.0, 2.0], False), ([5.0, 5.0], True)])
def test_a_sample_has_two_pieces_at_least(times, enough):
    assert Phase("training", pieces=18, times=times).enough(10) is enough


def test_rows_are_distinct_images_with_long_answers(tmp_path):
    make_rows(tmp_path / "rows", 3, (320, 240))
    rows = [json.loads(line) for line in (tmp_path / "rows" / "pairs.jsonl").open()]
    images = [Image.open(tmp_path / "rows" / row["image"]) for row in rows]
    assert [image.size for image in images] == [(320, 240)] * 3
    assert len({image.tobytes() for image in images}) == 3
    assert all(50 <= len(row[side].split()) <= 110 for row in rows for side in ("chosen", "rejected"))


def test_a_table_accounts_for_every_second():
    runs = {"first": Finished(10.0, 0, {"rows": 6.0, "model": 3.0}), "second": Finished(4.0, 0, {"model": 3.5})}
    assert phase_table(runs)[2:] == [
        "| rows | 6.0 | 0.0 |",
        "| model | 3.0 | 3.5 |",
        "| start, end and what no phase counts | 1.0 | 0.5 |",
        "| **all** | **10.0** | **4.0** |",
    ]


def test_a_peers_rows_are_read_without_our_package(tmp_path):
    peer.write_rows("tiny", EMBEDDED, 2, tmp_path / "rows.parquet")
    row, other = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))
    assert set(row) == {"images", "prompt", "chosen", "rejected"}
    assert [image.size for image in row["images"]] == [(512, 384)]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
    assert row["chosen"][0]["role"] == "assistant"
    assert row["chosen"] != other["chosen"]


@pytest.mark.parametrize("name", peer.CASES)
def test_a_peers_cases_are_what_their_names_say(name):
    case = Case.named(name)
    assert case.target in MODULES
    assert case.cap in (None, "8GiB")
    assert (case.setting == "auto") == (case.part == "engine")
    assert case.part == "engine" or 16 % case.micro == 0


def test_a_peers_result_is_found_among_what_libraries_print():
    line = json.dumps({"case": "trl/m/text/4+", "seconds": 0.5})
    assert peer.result("trl/m/text/4+", f"loading\n{line}\nbye\n") == {"case": "trl/m/text/4+", "seconds": 0.5}
    assert peer.result("trl/m/text/4+", "Traceback\nKeyError: 7\n\n") == {
        "case": "trl/m/text/4+",
        "error": "KeyError: 7",
    }


def test_a_peers_best_setting_is_compared_under_the_same_cap():
    def measured(case, seconds, **more):
        return {"case": case, "seconds": seconds, "first loss": 0.6931, "trained": 1234, "peak": 2.0, **more}

    found = [
        measured("unsloth/m/text/1+", 1.0),
        measured("unsloth/m/text/4+", 0.6),
        measured("unsloth/m/text/2+/8GiB", 0.9),
        {"case": "unsloth/m/text/8", "error": "out of memory"},
        measured("engine/m/text/auto", 0.02, once=0.04),
    ]
    assert peer.comparisons(found) == ["engine/m/text/auto: 30.0 x unsloth/m/text/4+, 10.0 x over a single epoch"]
    assert peer.table(found)[4:] == [
        "| unsloth/m/text/2+/8GiB | 0.9000 |  | 2.00 | 0.6931 | 1,234 |",
        "| unsloth/m/text/8 | out of memory | | | | |",
        "| engine/m/text/auto | 0.0200 | 0.0400 | 2.00 | 0.6931 | 1,234 |",
    ]
