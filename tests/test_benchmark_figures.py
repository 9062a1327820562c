"""What the benchmarks' figures rest on: plain TRL's time, scaled from a sample, and the rows."""

import json

import pytest
from PIL import Image

from benchmarks.command import Finished, make_rows, phase_table
from benchmarks.plain_trl import Phase


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
