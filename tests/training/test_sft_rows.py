"""trainer=sft on rows with one answer, from the files that people have to the result."""

import json

import pytest
import torch
from PIL import Image

from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.evaluation.held_out import HeldOut
from smolvlm_exp.tasks.evaluate import evaluate
from smolvlm_exp.tasks.train import train
from tests.conftest import QUICK, compose, losses

SHORT = ("trainer=sft", "quant=none", "adapter.r=2", "trainer.max_steps=3", "data.test_fraction=0.4")


@pytest.fixture
def folder(tmp_path):
    """Conversations as LLaVA has them."""
    lines = []
    for i in range(10):
        Image.new("RGB", (64, 64), (25 * i, 80, 200 - 9 * i)).save(tmp_path / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"It is image {i}."}]
        lines.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(lines))
    return tmp_path


def settings(folder, *overrides):
    own = [s for s in QUICK if not s.startswith(("data.", "trainer.max"))]
    return compose("data=files", f"data.folder={folder}", *own, *SHORT, f"trainer.cache={folder}/cache", *overrides)


@pytest.mark.parametrize("engine", ["shared", pytest.param("stock", marks=pytest.mark.slow)])
def test_from_conversations_to_the_result(folder, tmp_path, engine):
    run = tmp_path / "run"
    run.mkdir()
    summary = train(settings(folder, f"trainer.engine={engine}", "trainer.eval_strategy=steps"), run)
    assert summary["status"] == "done"
    assert summary["after"]["answer_logp"] > summary["before"]["answer_logp"]
    assert "preference_accuracy" not in summary["after"]
    assert summary["changes"]["answer_logp"]["difference"] > 0
    checks = {check["id"]: check["verdict"] for check in summary["checks"]}
    assert (checks["adapter_reload"], checks["policy_changed"], checks["image_contribution"]) == ("ok",) * 3
    assert len(losses(run)) == 3
    page = (run / "report.html").read_text()
    assert "Log-prob of the given answers" in page
    assert "It is image" in page
    again = tmp_path / "again"
    again.mkdir()
    found = evaluate(
        settings(folder, "task=evaluate", f"model.adapter={run}", "trainer.per_device_eval_batch_size=8"), again
    )
    assert found["after"]["answer_logp"] == pytest.approx(summary["after"]["answer_logp"], abs=1e-5)


def test_answers_are_scored_alike_packed_and_as_stock_trl_reads_them(folder, processor, model, tmp_path):
    rows = load_preferences(settings(folder).data, processor, tmp_path, rejected=False)
    packed, stock = (HeldOut(rows, processor, 2, None, packed=packed).logps(model) for packed in (True, False))
    assert packed.rejected is stock.rejected is None
    assert torch.equal(packed.chosen_tokens, stock.chosen_tokens)
    torch.testing.assert_close(packed.chosen, stock.chosen, atol=1e-4, rtol=1e-5)
