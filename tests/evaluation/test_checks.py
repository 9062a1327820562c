"""Each silent failure is provoked, and a check fails."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from smolvlm_exp.data.preferences import fingerprints, leaked_rows
from smolvlm_exp.data.sources import shapes
from smolvlm_exp.engine import forward
from smolvlm_exp.evaluation.checks import (
    Check,
    check_answers_reload,
    compare_evaluations,
    image_reliance,
    reward_image_contribution,
    squared_correlation,
)
from smolvlm_exp.evaluation.held_out import Evaluation, HeldOut
from smolvlm_exp.evaluation.preference import Logps, preference_metrics
from smolvlm_exp.evaluation.statistics import mean
from smolvlm_exp.tasks import evaluate as evaluate_task
from smolvlm_exp.tasks.train import train
from smolvlm_exp.training.sanity_checks import excuse_short_run, without_gradient
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


@pytest.mark.parametrize(
    ("changes", "accuracies", "failing"),
    [
        ({}, [1.0], {}),
        ({"chosen": -20.0, "rejected": -22.0}, [], {"policy_changed": "fail"}),
        ({"wrong_image_drop": 0.0}, [], {"image_contribution": "fail", "image_reliance": "warn"}),
        ({"wrong_image_drop": -0.3}, [], {"image_contribution": "fail", "image_reliance": "warn"}),  # it misleads
        ({"wrong_image_drop": 0.4}, [], {"image_reliance": "warn"}),
        ({"chosen": -23.0}, [], {"likelihood_displacement": "warn"}),
        ({"mean_length": 6.0}, [], {"length_change": "warn"}),
        ({"chosen": -20.5, "rejected": -22.0}, [0.9, 1.0], {"generalization_gap": "warn"}),  # trained, not generalized
    ],
)
def test_each_fault_fails_its_own_check(changes, accuracies, failing):
    good = {"chosen": -19.0, "rejected": -30.0, "wrong_image_drop": 0.9, "blank_image_drop": 0.7, "mean_length": 14.0}
    after = evaluation(**{**good, **changes}, reference=BEFORE.logps)
    history = [{"loss": 0.1}, *({"rewards/accuracies": accuracy} for accuracy in accuracies)]
    found = verdicts(BEFORE, after, history)
    assert {check: verdict for check, verdict in found.items() if verdict != "ok"} == failing
    assert len(found) == 7 + bool(accuracies)


def test_without_pairs_the_answers_are_checked():
    """Those that the models wrote: one of two changed, and half as long."""
    before = Evaluation({"mean_length": mean([8.0, 8.0])}, None, ["A star.", "A moon."])
    after = Evaluation({"mean_length": mean([4.0, 3.0])}, None, ["A star.", "A ring."])
    assert verdicts(before, after) == {"leaked_rows": "ok", "answers_changed": "ok", "length_change": "warn"}
    assert verdicts(before, before)["answers_changed"] == "warn"


def earned(prompts, answers, ids, truth):
    """One for an answer that says star; a row whose truth is unknown is left out."""
    totals = [float("star" in text) if known else None for text, known in zip(answers, truth, strict=True)]
    return {"star": totals}, totals


@pytest.mark.parametrize(
    ("blank", "value", "verdict"), [("A star.", -0.5, "warn"), ("A moon.", 0.5, "ok")], ids=["guessed", "seen"]
)
def test_a_reward_that_a_blank_image_earns_too(rows, processor, model, monkeypatch, blank, value, verdict):
    held_out, seen = HeldOut(rows, processor, 8, None), []

    def written(model, processor, rows, sampling):
        seen.extend((row["images"][0].size, row["images"][0].getextrema()) for row in rows)
        return [blank] * len(rows)

    monkeypatch.setattr("smolvlm_exp.evaluation.held_out.generate_answers", written)
    answers = ["A star.", "A moon."] * 8
    (check,) = reward_image_contribution(model, held_out, answers, earned, 4)
    assert (check.value, check.verdict) == (value, verdict)
    assert (check.detail == "reward unchanged when the picture is blank") == (verdict == "warn")
    assert seen == [(row["images"][0].size, ((127, 127),) * 3) for row in rows.test]


def test_nothing_is_asked_of_rows_that_are_not_scored(rows, processor, model, monkeypatch):
    monkeypatch.setattr("smolvlm_exp.evaluation.held_out.generate_answers", lambda *args: ["A star."] * 16)
    none = HeldOut(rows, processor, 8, None)
    unknown = {"star": [None] * 16}, [None] * 16
    assert reward_image_contribution(model, none, ["A star."] * 16, lambda *args: unknown, 4) == []
    monkeypatch.setattr(rows, "test", rows.test.remove_columns("truth"))
    assert reward_image_contribution(model, HeldOut(rows, processor, 8, None), ["A star."] * 16, earned, 4) == []


@pytest.mark.parametrize(("spoiled", "value"), [(False, 0), (True, 4)])
def test_an_adapter_that_is_not_the_trained_one_answers_otherwise(rows, processor, model, tmp_path, spoiled, value):
    """Where rows have no pairs: greedy answers before and after it is loaded from its folder."""
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    tuned.save_pretrained(tmp_path / "adapter")
    if spoiled:
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({name: weight * 0 for name, weight in load_file(path).items()}, path)
    check = check_answers_reload(tuned, tmp_path, HeldOut(rows, processor, 8, None), 8)
    assert (check.id, check.value, check.verdict) == ("adapter_reload", value, "fail" if spoiled else "ok")


def test_a_margin_that_is_only_answer_length():
    """Every rejected answer loses half a nat per token, which is all there is to the margin."""
    longer = torch.arange(24.0)
    before = evaluation(-20.0, -22.0)
    before = replace(before, logps=replace(before.logps, rejected_tokens=10 + longer))
    after = replace(before, logps=replace(before.logps, rejected=before.logps.rejected - 0.5 * longer))
    assert verdicts(before, after)["length_share"] == "warn"
    assert squared_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])) == pytest.approx(1)
    assert squared_correlation(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])) == 0


def test_held_out_rows_that_are_also_in_train(rows):
    train = fingerprints(rows.train)
    assert leaked_rows(train, fingerprints(rows.test)) == []
    assert leaked_rows(train, fingerprints(rows.train.select([3, 4]))) == [0, 1]
    other = rows.train.select([3]).map(lambda row: {"chosen": row["rejected"]})
    assert leaked_rows(train, fingerprints(other)) == [0]  # its answer does not matter
    report = {"test": {"also_in_train": 1}}
    assert verdicts(BEFORE, BEFORE, data=report)["leaked_rows"] == "fail"


def found(summary, id):
    """A check's verdict and value."""
    return next((check["verdict"], check["value"]) for check in summary["checks"] if check["id"] == id)


def test_an_adapter_that_never_moves(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    summary = train(quick("trainer.optim=adamw_torch"), tmp_path)
    assert found(summary, "parameters_moved") == ("fail", 0)
    assert next(iter(summary["checks"]))["detail"].startswith("not base_model.model.model.text_model.layers.0.")
    assert found(summary, "magnitudes_moved")[0] == "fail"
    assert found(summary, "policy_changed")[0] == "fail"


def test_an_adapter_that_is_off_when_training_rows_are_evaluated(quick, tmp_path, monkeypatch, capsys):
    from smolvlm_exp.tasks import result

    evaluate, load = result.evaluate, shapes.load

    def off(model, *args, **kwargs):
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(result, "evaluate", off)
    monkeypatch.setattr(shapes, "load", lambda config, split: load(config, config.train).select(range(8)))
    summary = train(quick(), tmp_path)
    assert found(summary, "policy_changed")[0] == "fail"
    assert found(summary, "leaked_rows") == ("fail", 8)
    assert "8 test rows are also in train (e.g. row 0)" in capsys.readouterr().out


def test_an_image_that_may_mislead_by_chance_alone_is_a_warning():
    drops = {"wrong_image_drop": mean([-0.3, 0.2, -0.2, 0.1])}
    (check,) = image_reliance(drops, drops)
    assert (check.verdict, check.value) == ("warn", pytest.approx(-0.05))
    assert check.detail == "95 % CI -0.25 to 0.15"


def test_rounding_is_not_taken_for_image_reliance(model, processor, rows, monkeypatch):
    """On a GPU a row's numbers depend a little on its batch, which is no sign that an image arrived."""
    held_out, states = HeldOut(rows, processor, 6, None), forward.answer_states

    def blind(model, packed, pixels):
        """Without images, and its numbers a little off by how many rows are scored together."""
        return states(model, {**packed, "image_at": packed["image_at"][:0]}, pixels) * (1 + 1e-4 * packed["tokens"])

    def drops():
        return held_out.image_reliance(model, held_out.logps(model))

    before = drops()
    assert before["blank_image_drop"].value > 0.5
    monkeypatch.setattr(forward, "answer_states", blind)
    after = drops()
    assert {name: drop.value for name, drop in after.items()} == {"blank_image_drop": 0.0, "wrong_image_drop": 0.0}
    assert [check.verdict for check in image_reliance(before, after)] == ["fail", "warn"]


def test_answers_that_would_be_cut_to_nothing(quick, tmp_path):
    """TRL would silently train on no answer at all."""
    message = r"train row 0: the prompt alone is \d+ tokens .* leaves none for the answer"
    with pytest.raises(RequestError, match=message):
        train(quick("data.max_length=30", "trainer.engine=stock"), tmp_path)
    with pytest.raises(RequestError, match=r"trainer\.extra\.max_length: set data\.max_length"):
        train(quick("+trainer.extra.max_length=30", "trainer.engine=stock"), tmp_path)


@pytest.mark.usefixtures("unseen")
def test_a_tuned_model_evaluated_on_rows_of_its_training(quick, tmp_path, monkeypatch):
    """By task=evaluate, which has no training rows but those that the run noted."""
    monkeypatch.setattr(evaluate_task, "generation_speed", lambda *args: [])
    monkeypatch.setattr(evaluate_task, "evaluate_model", lambda *args, **kwargs: BEFORE)
    (tmp_path / "run").mkdir()
    train(quick(), tmp_path / "run")
    config = quick("task=evaluate", f"model.adapter={tmp_path}/run")
    assert found(evaluate_task.evaluate(config, tmp_path), "leaked_rows") == ("ok", 0)
    load = shapes.load
    monkeypatch.setattr(shapes, "load", lambda config, split: load(config, config.train).select(range(5)))
    assert found(evaluate_task.evaluate(config, tmp_path), "leaked_rows") == ("fail", 5)


def test_an_adapter_that_is_not_loaded(quick, tmp_path, monkeypatch, model):
    """task=evaluate would evaluate the base. PEFT passes over keys that a file lacks."""
    from peft import get_peft_model
    from safetensors.torch import load_file, save_file

    from smolvlm_exp.models.adapter import lora_config

    config = quick("model.id=embedded", "quant=none", "task=evaluate", f"model.adapter={tmp_path}")
    tuned = get_peft_model(model, lora_config(config.adapter, quantised=False))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path)
    monkeypatch.setattr(evaluate_task, "generation_speed", lambda *args: [])
    assert found(evaluate_task.evaluate(config, tmp_path), "policy_changed")[0] == "ok"
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: tensor * ("lora_B" not in key) for key, tensor in tensors.items()}, path)
    assert found(evaluate_task.evaluate(config, tmp_path), "policy_changed")[0] == "fail"
    save_file({key.replace("base_model", "model"): tensor for key, tensor in tensors.items()}, path)
    with pytest.raises(RequestError, match=r"model\.adapter=.*: its file lacks \d+ tensors, e\.g\. base_model.*lora_A"):
        evaluate_task.evaluate(config, tmp_path)


@pytest.mark.usefixtures("unseen")
def test_a_wrong_reference_and_a_base_that_is_changed(quick, tmp_path, monkeypatch):
    from smolvlm_exp.engine.trainers import SharedPrefixDPOTrainer

    ordinary = SharedPrefixDPOTrainer.score_references

    def shifted(self, *args, **kwargs):
        ordinary(self, *args, **kwargs)
        chosen, rejected = self.rows.reference
        self.rows.reference = chosen + 1, rejected

    class Tamper(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.get_base_model().get_input_embeddings().weight[5, 7] += 1e-3

    monkeypatch.setattr(SharedPrefixDPOTrainer, "score_references", shifted)
    summary = train(quick(*SIGMOID), tmp_path, watchers=[Tamper()])
    failed = {check["id"] for check in summary["checks"] if check["verdict"] == "fail"}
    assert failed == {"reference_at_start", "first_loss_ln2", "base_unchanged"}


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(("part", "share"), [("magnitude", 2 / 3), ("", 0)])
def test_an_adapter_that_is_frozen(quick, tmp_path, monkeypatch, part, share):
    """As PEFT loads an adapter unless it is told otherwise: nothing learns, and nothing complains."""
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
        assert found(summary, name) == ("fail", pytest.approx(share, abs=0.03))
    assert found(summary, "magnitudes_moved")[1] == 0


def test_a_tensor_without_gradient():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([used, unused], lr=0.1)
    (used.sum() + 0 * unused.sum()).backward()
    optimizer.step()
    trained = {"used": used, "unused": unused}
    assert without_gradient(trained, optimizer) == ["unused"]
    assert without_gradient(trained, torch.optim.SGD([used], lr=0.1)) is None


def test_an_adapter_that_is_saved_in_part(quick, tmp_path, monkeypatch):
    """A key is missing from the file, which PEFT ignores silently."""
    from safetensors.torch import load_file, save_file

    from smolvlm_exp.tasks import result

    ordinary = result.save_finetuned

    def partly(model, processor, config, folder, base, card):
        ordinary(model, processor, config, folder, base, card)
        path = folder / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        del tensors[next(name for name in tensors if "lora_B" in name)]
        save_file(tensors, path)

    monkeypatch.setattr(result, "save_finetuned", partly)
    assert found(train(quick("trainer.learning_rate=1e-2"), tmp_path), "adapter_reload")[0] == "fail"


@pytest.mark.parametrize(
    ("steps", "warmup", "told"), [(1, 0, "1 step"), (2, 1, "1 step"), (1, 1, "0 steps"), (3, 1, "")]
)
def test_a_run_too_short_to_say_what_moves_does_not_fail(steps, warmup, told):
    args = SimpleNamespace(get_warmup_steps=lambda max_steps: warmup)
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(global_step=steps, max_steps=steps))
    moved, base = (
        Check("parameters_moved", "", 0, ">= 1", "fail", "not x"),
        Check("base_unchanged", "", 0, ">= 1", "fail"),
    )
    assert excuse_short_run([moved, base], trainer)[1] == base
    said = f"too short to say: {told} at a learning rate above 0"
    expected = replace(moved, verdict="warn", detail=said) if told else moved
    assert excuse_short_run([moved, base], trainer)[0] == expected
