"""The first lines of a command."""

import logging

import pytest

from smolvlm_exp.tasks import opening
from smolvlm_exp.tasks.opening import announce
from tests.conftest import compose

CHOSEN = {"model": "tiny", "quant": "nf4", "adapter": "dora", "data": "shapes", "trainer": "rpo"}


@pytest.fixture
def announced(monkeypatch, tmp_path):
    """The lines of a command with these overrides."""
    monkeypatch.chdir(tmp_path)
    lines = []
    monkeypatch.setattr(logging.getLogger("smolvlm_exp.tasks.opening"), "info", lines.append)

    def lines_of(*overrides, **choices):
        lines.clear()
        announce(compose(*overrides), tmp_path / "outputs" / "x", {**CHOSEN, **choices})
        return list(lines)

    return lines_of


def test_a_run_says_where_what_and_how_long(announced, monkeypatch):
    first, tuned, time, imports = announced("trainer.learning_rate=2e-3", **{"tuned@trainer": "tiny"})
    assert first == "outputs/x: train model=tiny quant=nf4 data=shapes adapter=dora trainer=rpo"
    assert tuned.startswith("tuned/tiny (for model=tiny): max_steps 110, per_device_train_batch_size 16, ")
    assert "learning_rate" not in tuned  # it is the command's own
    assert time == "expected time: unknown until a run of this model and data has finished here"
    assert imports == "importing PyTorch, transformers and TRL ..."
    monkeypatch.setattr(opening, "estimate_time", lambda folder, left: (75.0, "outputs/y, the latest run"))
    assert announced("resume=outputs/x")[:2] == [
        "outputs/x: resuming train model=tiny quant=nf4 data=shapes adapter=dora trainer=rpo",
        "expected time: about 1 min 15 s, from outputs/y, the latest run",
    ]


def test_another_task_says_on_what_it_works(announced):
    assert announced("task=evaluate", "run=outputs/y") == [
        "outputs/x: evaluate model=tiny quant=nf4 data=shapes", "run: outputs/y", opening.IMPORTING,
    ]  # fmt: skip
    base = "model: embedded, the untuned base; for a tuned one: task=chat run=last, or run=FOLDER"
    assert announced("task=chat") == ["chat model=tiny quant=nf4", base, opening.IMPORTING]
    assert "model: embedded with the adapter a" in announced("task=serve", "model.adapter=a")
    assert announced("task=doctor") == announced("task=runs") == []
