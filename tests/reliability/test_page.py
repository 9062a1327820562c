"""docs/reliability.md names a test for each guarantee and for each thing that is attacked, and these tests exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_every_row_names_tests_that_exist():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition("Measured on")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if "test in" not in row[2]]
    assert [row[0] for row in rows if re.match(r"P\d", row[0])] == [f"P{number}" for number in range(1, 13)]
    for *_, cell in rows:
        names = re.findall(r"`([^`]+)`", cell)
        assert names, cell
        for name in names:
            file, _, test = name.partition("::")
            if file:
                path = ROOT / file if file.startswith("tests/") else HERE / file
            assert path.exists(), name
            if test:
                assert f"\ndef {test.removesuffix('...')}" in path.read_text(encoding="utf-8"), name
