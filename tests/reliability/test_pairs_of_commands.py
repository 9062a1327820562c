"""Two commands at once on one folder, every pair: each leaves a whole result, or is refused in one line that names it.

The pairs whose moment can be made long are in test_two_at_once.py.
"""

import csv
import shutil
import time
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

from smolvlm_exp.sweep.results import read_results
from tests.reliability.smallest import SMALLEST, TOLERANT, check_same, ended, result, typed

LONGER = ("trainer.max_steps=3", "resume_allow=[trainer.max_steps]")


class Commands:
    """What each command is on `folder`, and whether its result there is whole.

    Args:
        alone: a run that was left alone; longer: the result of resuming it.
    """

    def __init__(self, folder: Path, alone: Path, longer: dict) -> None:
        self.folder, self.alone, self.longer = folder, alone, longer
        self.adapters: set[bytes] = set()

    def words(self, command: str, own: Path) -> list[str]:
        return {
            "run": [*SMALLEST, f"hydra.run.dir={self.folder}"],
            "sweep": ["-m", *SMALLEST, "seed=1,2", f"hydra.sweep.dir={self.folder}"],
            "resume": [f"resume={self.folder}", *LONGER],
            "export": ["task=export", f"run={self.folder}", *TOLERANT, f"hydra.run.dir={own}"],
            "compare": ["task=compare", f"runs=[{self.folder},{self.alone}]", f"hydra.run.dir={own}"],
        }[command]

    def note_adapter(self) -> None:
        path = self.folder / "adapter" / "adapter_model.safetensors"
        self.adapters |= {path.read_bytes()} if path.is_file() else set()

    def check(self, command: str, own: Path, resumed: bool) -> None:
        if command == "run":
            check_same(without_exports(result(self.folder)), self.longer if resumed else result(self.alone))
        elif command == "resume":
            check_same(without_exports(result(self.folder)), self.longer)
        elif command == "sweep":
            assert [job.status for job in read_results(self.folder, None).jobs] == ["done", "done"]
            rows = list(csv.DictReader((self.folder / "sweep.csv").open()))
            assert [(row["status"], row["after.preference_accuracy"]) for row in rows] == [
                ("done", "0.25"),
                ("done", "0.5"),
            ]
        elif command == "export":
            written = self.folder / "export" / "adapter"
            assert (written / "adapter_model.safetensors").read_bytes() in self.adapters
            assert (written / "export.json").is_file()
        else:
            assert len(list(csv.DictReader((own / "compare.csv").open()))) >= 1
            assert "</html>" in (own / "compare.html").read_text()


def without_exports(left: dict) -> dict:
    return {**left, "names": [name for name in left["names"] if not name.startswith("export")]}


@pytest.fixture(scope="module")
def longer(alone, tmp_path_factory):
    """The result of the run that is trained further, left alone."""
    folder = tmp_path_factory.mktemp("longer")
    shutil.copytree(alone, folder / "run")
    words = Commands(folder / "run", alone, {}).words("resume", folder)
    code, said = ended(typed(words, folder / "log"), folder / "log")
    assert code == 0, said[-3000:]
    return result(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True], ids=["nothing", "a run"])
@pytest.mark.parametrize("delay", [0.0, 1.0])
@pytest.mark.parametrize(
    "pair", list(combinations_with_replacement(("run", "sweep", "resume", "export", "compare"), 2)), ids="-".join
)
def test_two_commands_on_one_folder(alone, longer, tmp_path, pair, delay, begun):
    """There is nothing in the folder when they begin, or a run that has ended."""
    commands = Commands(tmp_path / "run", alone, longer)
    if begun:
        shutil.copytree(alone, commands.folder)
    commands.note_adapter()
    children = []
    for number, command in enumerate(pair):
        own = tmp_path / str(number)
        own.mkdir()
        children.append((command, own, typed(commands.words(command, own / "out"), own / "log")))
        time.sleep(delay)
    ends = [(command, own, *ended(child, own / "log")) for command, own, child in children]
    commands.note_adapter()
    resumed = ("resume", 0) in [(command, code) for command, _, code, _ in ends]
    for command, own, code, said in ends:
        assert "Traceback" not in said, said[-3000:]
        if code:
            line = next(line for line in said.splitlines() if line.startswith("smolvlm_exp: "))
            assert str(commands.folder) in line, line
            print(f"{command}: {line}")
        else:
            commands.check(command, own / "out", resumed)
    possible = ("resume", "export", "compare") if begun else ("run", "sweep")
    codes = [code for command, _, code, _ in ends if command in possible]
    assert not codes or 0 in codes
    if begun and "resume" not in pair:
        check_same(without_exports(result(commands.folder)), result(alone))
