"""Each silent failure provoked, and what the checks say to it."""

from contextlib import nullcontext
from dataclasses import replace
from functools import wraps

import pytest
import torch
from transformers import TrainerCallback

from smolvlm_exp.data.preferences import fingerprints, leaked_rows
from smolvlm_exp.data.sources import shapes
from smolvlm_exp.evaluation.checks import compare_evaluations, squared_correlation
from smolvlm_exp.evaluation.held_out import Evaluation
from smolvlm_exp.evaluation.preference import Logps, preference_metrics
from smolvlm_exp.evaluation.statistics import mean
from smolvlm_exp.tasks.train import train
from smolvlm_exp.training import sanity_checks as training_checks
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import SIGMOID

APART = {"test": {"also_in_train": 0}}


def evaluation(chosen, rejected, tokens=(10, 10), reference=None, **means):
    rows = 24
    logps = Logps(*(torch.as_tensor(side, dtype=torch.float32).expand(rows).clone() for side in (chosen, rejected)),
                  *(torch.full((rows,), float(count)) for count in tokens))  # fmt: skip
    ratios = preference_metrics(logps, reference) | {name: mean([value]) for name, value in means.items()}
    return Evaluation(ratios, logps, [])


def verdicts(before, after, history=(), data=APART):
    return {check.id: check.verdict for check in compare_evaluations(before, after, list(history), data)}


BEFORE = evaluation(-20.0, -22.0, wrong_image_drop=1.0, blank_image_drop=0.8, mean_length=15.0)


def test_a_good_run_has_no_complaint():
    after = evaluation(-19.0, -30.0, reference=BEFORE.logps, wrong_image_drop=0.9, blank_image_drop=0.7, mean_length=14)
    found = verdicts(BEFORE, after, [{"rewards/accuracies": 1.0}])
    assert set(found.values()) == {"ok"}
    assert len(found) == 8


@pytest.mark.parametrize(
    ("changes", "check", "verdict"),
    [
        ({"chosen": -20.0, "rejected": -22.0}, "policy_changed", "fail"),
        ({"wrong_image_drop": 0.0}, "image_contribution", "fail"),
        ({"wrong_image_drop": 0.4}, "image_reliance", "warn"),
        ({"chosen": -23.0}, "likelihood_displacement", "warn"),
        ({"mean_length": 6.0}, "length_change", "warn"),
    ],
)
def test_what_went_wrong_is_named(changes, check, verdict):
    good = {"chosen": -19.0, "rejected": -30.0, "wrong_image_drop": 0.9, "mean_length": 14.0}
    assert verdicts(BEFORE, evaluation(**good, reference=BEFORE.logps))[check] == "ok"
    assert verdicts(BEFORE, evaluation(**{**good, **changes}, reference=BEFORE.logps))[check] == verdict


def test_a_margin_that_is_length():
    """Every rejected answer loses half a nat a token of its length, which is all there is to the margin."""
    longer = torch.arange(24.0)
    before = evaluation(-20.0, -22.0)
    before = replace(before, logps=replace(before.logps, rejected_tokens=10 + longer))
    after = replace(before, logps=replace(before.logps, rejected=before.logps.rejected - 0.5 * longer))
    assert verdicts(before, after)["length_share"] == "warn"
    assert squared_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])) == pytest.approx(1)
    assert squared_correlation(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])) == 0


def test_training_rows_learnt_by_heart():
    after = evaluation(-21.0, -22.0, reference=BEFORE.logps, mean_length=15.0)  # nothing learnt
    history = [{"rewards/accuracies": 0.9}, {"loss": 0.1, "rewards/accuracies": 1.0}]
    assert verdicts(BEFORE, after, history)["generalization_gap"] == "warn"


def test_held_out_rows_that_are_trained_on(rows):
    train = fingerprints(rows.train)
    assert leaked_rows(train, fingerprints(rows.test)) == []
    assert leaked_rows(train, fingerprints(rows.train.select([3, 4]))) == [0, 1]
    other = rows.train.select([3]).map(lambda row: {"chosen": row["rejected"]})
    assert leaked_rows(train, fingerprints(other)) == [0]  # its answer does not matter
    report = {"test": {"also_in_train": 1}}
    assert verdicts(BEFORE, BEFORE, data=report)["leaked_rows"] == "fail"


def of(summary, id):
    return next(check for check in summary["checks"] if check["id"] == id)


def test_an_adapter_that_never_moves(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    summary = train(quick("trainer.optim=adamw_torch"), tmp_path)
    moved = of(summary, "parameters_moved")
    assert (moved["verdict"], moved["value"]) == ("fail", 0)
    assert moved["detail"].startswith("not base_model.model.model.text_model.layers.0.")
    assert of(summary, "magnitudes_moved")["verdict"] == "fail"
    assert of(summary, "policy_changed")["verdict"] == "fail"


def test_an_adapter_that_is_off_when_it_is_evaluated(quick, tmp_path, monkeypatch):
    from smolvlm_exp.tasks import train as pipeline

    ordinary = pipeline.evaluate

    def off(model, *args, **kwargs):
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            return ordinary(model, *args, **kwargs)

    name = "policy_changed"
    monkeypatch.setattr(pipeline, "evaluate", off)
    assert of(train(quick(), tmp_path), name)["verdict"] == "fail"


def test_pictures_that_never_arrive(quick, tmp_path, monkeypatch):
    from transformers import Idefics3ForConditionalGeneration

    ordinary = Idefics3ForConditionalGeneration.forward

    @wraps(ordinary)
    def without(self, *args, pixel_values=None, **kwargs):
        return ordinary(self, *args, pixel_values=None, **kwargs)

    monkeypatch.setattr(Idefics3ForConditionalGeneration, "forward", without)
    summary = train(quick("trainer.engine=stock", "quant=none"), tmp_path)
    assert of(summary, "image_contribution")["verdict"] == "fail"


def test_rounding_is_not_taken_for_looking(model, processor, rows, monkeypatch):
    """On a GPU a row's numbers depend a little on the batch it is in, which is no sign that a picture arrived."""
    from transformers import Idefics3ForConditionalGeneration

    from smolvlm_exp.evaluation.preference import image_reliance_metrics

    ordinary = Idefics3ForConditionalGeneration.forward

    @wraps(ordinary)
    def without(self, *args, pixel_values=None, **kwargs):
        output = ordinary(self, *args, pixel_values=None, **kwargs)
        output.logits = output.logits * (1 + 1e-4 * len(output.logits))
        return output

    assert image_reliance_metrics(model, processor, rows.test, 8, None)["blank_image_drop"].value > 0.5
    monkeypatch.setattr(Idefics3ForConditionalGeneration, "forward", without)
    assert {drop.value for drop in image_reliance_metrics(model, processor, rows.test, 8, None).values()} == {0.0}


def test_answers_of_which_no_token_is_left(quick, tmp_path):
    """TRL would cut every answer to nothing, and train on that without a word."""
    with pytest.raises(
        RequestError, match=r"train row 0: the prompt alone is \d+ tokens .* leaves none for the answer"
    ):
        train(quick("data.max_length=30", "trainer.engine=stock"), tmp_path)
    with pytest.raises(RequestError, match=r"trainer\.extra\.max_length: set data\.max_length"):
        train(quick("+trainer.extra.max_length=30", "trainer.engine=stock"), tmp_path)


def test_an_evaluation_on_training_rows(quick, tmp_path, monkeypatch, capsys):
    ordinary = shapes.load
    monkeypatch.setattr(shapes, "load", lambda config, split: ordinary(config, config.train).select(range(8)))
    check = of(train(quick(), tmp_path), "leaked_rows")
    assert (check["verdict"], check["value"]) == ("fail", 8)
    assert "8 test rows are also in train (e.g. row 0)" in capsys.readouterr().out


def test_a_tuned_model_is_evaluated_on_what_it_was_tuned_on(quick, tmp_path, monkeypatch):
    """By task=evaluate, which has no training rows to look at but those that the run noted."""
    from smolvlm_exp.tasks.evaluate import evaluate

    monkeypatch.setattr("smolvlm_exp.tasks.evaluate.generation_speed", lambda *args: [])
    (tmp_path / "run").mkdir()
    train(quick("data.test_rows=2"), tmp_path / "run")
    config = quick("task=evaluate", f"model.adapter={tmp_path}/run", "data.test_rows=4")
    check = of(evaluate(config, tmp_path), "leaked_rows")
    assert (check["verdict"], check["value"]) == ("ok", 0)
    ordinary = shapes.load
    monkeypatch.setattr(shapes, "load", lambda config, split: ordinary(config, config.train).select(range(5)))
    check = of(evaluate(config, tmp_path), "leaked_rows")
    assert (check["verdict"], check["value"]) == ("fail", 5)


def test_an_adapter_that_is_not_loaded(quick, tmp_path, monkeypatch, model):
    """task=evaluate would look at the base. PEFT passes over keys that a file lacks."""
    from peft import get_peft_model
    from safetensors.torch import load_file, save_file

    from smolvlm_exp.models.adapter import lora_config
    from smolvlm_exp.tasks.evaluate import evaluate

    config = quick("quant=none", "task=evaluate", f"model.adapter={tmp_path}")
    tuned = get_peft_model(model, lora_config(config.adapter, quantised=False))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path)
    monkeypatch.setattr("smolvlm_exp.tasks.evaluate.generation_speed", lambda *args: [])
    name = "policy_changed"
    assert of(evaluate(config, tmp_path), name)["verdict"] == "ok"
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: tensor * ("lora_B" not in key) for key, tensor in tensors.items()}, path)
    assert of(evaluate(config, tmp_path), name)["verdict"] == "fail"
    save_file({key.replace("base_model", "model"): tensor for key, tensor in tensors.items()}, path)
    with pytest.raises(RequestError, match=r"model\.adapter=.*: its file lacks \d+ tensors, e\.g\. base_model.*lora_A"):
        evaluate(config, tmp_path)


@pytest.mark.usefixtures("unseen")
def test_a_wrong_reference(quick, tmp_path, monkeypatch):
    from smolvlm_exp.engine.trainers import SharedPrefixDPOTrainer

    ordinary = SharedPrefixDPOTrainer.score_references

    def shifted(self, *args):
        ordinary(self, *args)
        chosen, rejected = self.collator.rows.reference
        self.collator.rows.reference = chosen + 1, rejected

    monkeypatch.setattr(SharedPrefixDPOTrainer, "score_references", shifted)
    summary = train(quick(*SIGMOID), tmp_path)
    assert of(summary, "reference_at_start")["verdict"] == "fail"
    assert of(summary, "first_loss_ln2")["verdict"] == "fail"


@pytest.mark.usefixtures("unseen")
def test_a_base_that_is_changed(quick, tmp_path):
    class Tamper(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.get_base_model().get_input_embeddings().weight[5, 7] += 1e-3

    summary = train(quick(), tmp_path, watchers=[Tamper()])
    assert of(summary, "base_unchanged")["verdict"] == "fail"
    assert of(summary, "parameters_moved")["verdict"] == "ok"


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(("part", "share"), [("magnitude", 2 / 3), ("", 0)])
def test_an_adapter_that_is_frozen(quick, tmp_path, monkeypatch, part, share):
    """As PEFT gives back what it loads, save that it is asked otherwise: nothing learns, and nothing complains."""
    from smolvlm_exp.training import dpo

    ordinary = dpo.build_trainer

    def frozen(*args):
        trainer = ordinary(*args)
        adapter = [p for name, p in trainer.model.named_parameters() if "lora_" in name and part in name]
        for parameter in adapter:
            parameter.requires_grad_(False)
        trainer.model.lm_head.weight.requires_grad_(not part)  # something has to learn
        return trainer

    monkeypatch.setattr(dpo, "build_trainer", frozen)
    summary = train(quick("quant=none", "trainer.engine=stock"), tmp_path)
    for name in ("parameters_moved", "parameters_with_gradient"):
        assert (of(summary, name)["verdict"], of(summary, name)["value"]) == ("fail", pytest.approx(share, abs=0.01))
    assert of(summary, "magnitudes_moved")["value"] == 0


def test_a_tensor_without_gradient():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([used, unused], lr=0.1)
    (used.sum() + 0 * unused.sum()).backward()
    optimizer.step()
    learnt = {"used": used, "unused": unused}
    assert training_checks.without_gradient(learnt, optimizer) == ["unused"]
    assert training_checks.without_gradient(learnt, torch.optim.SGD([used], lr=0.1)) is None


def test_an_adapter_that_is_saved_in_part(quick, tmp_path, monkeypatch):
    """A key is missing from the file, which PEFT reads without a word."""
    from safetensors.torch import load_file, save_file

    from smolvlm_exp.tasks import result

    ordinary = result.save_finetuned

    def partly(model, config, folder):
        ordinary(model, config, folder)
        path = folder / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        del tensors[next(name for name in tensors if "lora_B" in name)]
        save_file(tensors, path)

    name = "adapter_reload"
    monkeypatch.setattr(result, "save_finetuned", partly)
    assert of(train(quick("trainer.learning_rate=1e-2"), tmp_path), name)["verdict"] == "fail"
