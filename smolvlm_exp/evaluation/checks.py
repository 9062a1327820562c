"""What evaluations before and after tuning show about a run that its loss does not."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.evaluation.held_out import Evaluation, HeldOut
from smolvlm_exp.evaluation.image_reliance import ABLATED_ROWS
from smolvlm_exp.evaluation.preference import Logps
from smolvlm_exp.evaluation.reward_metrics import Scorer
from smolvlm_exp.evaluation.statistics import Ratio, intervals
from smolvlm_exp.evaluation.verdict import MIN_ROWS

if TYPE_CHECKING:
    from peft import PeftModel

SIDES = ("chosen", "rejected")
MIN_CHANGE = 1e-4  # nats/token; rounding in float32 is a hundredth of it
MAX_DROP = 0.1  # nats/token that chosen answers may lose: beyond, it is likelihood displacement
MIN_RELIANCE = 0.5  # share of the image's contribution before tuning that has to remain
MIN_CONTRIBUTION = 0.05  # nats/token below which an image's contribution is too small to compare
MAX_LENGTH_SHARE = 0.5  # of the margin's variance that answers' lengths may explain
MAX_GAP = 0.2  # of reward accuracy, training over held-out rows
MAX_LENGTH_CHANGE = 0.5  # by which generated answers may grow or shrink
MAX_RELOAD_ERROR = 1e-4  # nats; the same weights in the same batch give the same numbers
RELOADED_ROWS = 4  # whose answers tell whether the saved adapter is the trained one
LAST_EVENTS = 5  # logged events over which training's accuracy is averaged


@dataclass(frozen=True)
class Check:
    """As summary.json has it."""

    id: str  # stable: scripts, W&B (`checks/<id>`) and advice go by it
    name: str  # for display
    value: float
    threshold: str
    verdict: str  # ok, warn or fail
    detail: str = ""  # what is behind a verdict other than ok


def require(
    id: str, name: str, value: float, comparison: str, bound: float, otherwise: str = "fail", detail: str = ""
) -> Check:
    """
    Args:
        comparison: `<=`, `>=` or `>`, between the value and its bound.
        otherwise: the verdict where it does not hold.
    """
    good = {"<=": operator.le, ">=": operator.ge, ">": operator.gt}[comparison](value, bound)
    return Check(id, name, float(value), f"{comparison} {bound:g}", "ok" if good else otherwise, "" if good else detail)


def leaked_rows(count: int) -> Check:
    return require("leaked_rows", "held-out rows that are also in train", count, "<=", 0)


def checks_passed(checks: Sequence[Check]) -> bool:
    return all(check.verdict != "fail" for check in checks)


def compare_evaluations(
    before: Evaluation, after: Evaluation, history: list[dict[str, float]], data: dict[str, dict[str, Any]]
) -> list[Check]:
    """
    Args:
        before, after: of the same rows.
        history: the trainer's logged events.
        data: Preferences.report.
    """
    checks = [leaked_rows(data["test"]["also_in_train"]), policy_changed(before, after)]
    checks += image_reliance(before.ratios, after.ratios)
    if before.logps and after.logps:
        checks += answer_shifts(before.logps, after.logps)
    last = [event["rewards/accuracies"] for event in history if "rewards/accuracies" in event][-LAST_EVENTS:]
    if last and "reward_accuracy" in after.metrics:
        gap = sum(last) / len(last) - after.metrics["reward_accuracy"]
        name = "generalization gap (reward accuracy, training minus held-out)"
        checks.append(require("generalization_gap", name, gap, "<=", MAX_GAP, "warn"))
    if before.metrics.get("mean_length"):
        change = abs(after.metrics["mean_length"] / before.metrics["mean_length"] - 1)
        name = "relative change of generated answer length"
        checks.append(require("length_change", name, change, "<=", MAX_LENGTH_CHANGE, "warn"))
    return checks


def answer_shifts(before: Logps, after: Logps) -> list[Check]:
    """Did the chosen answers lose probability, and is it by their length that they gained on the rejected ones?"""
    chosen, *rejected = (drop.mean() for drop in logp_drops(before, after))
    detail = f"rejected answers fell by {rejected[0]:.2g}" if rejected else ""
    name = "chosen log-prob drop (likelihood displacement), nats/token"
    checks = [require("likelihood_displacement", name, chosen.item(), "<=", MAX_DROP, "warn", detail)]
    if before.rejected is None or after.rejected is None or after.rejected_tokens is None:
        return checks
    margin = (after.chosen - before.chosen) - (after.rejected - before.rejected)
    if len(margin) >= MIN_ROWS:
        share = squared_correlation(margin, after.chosen_tokens - after.rejected_tokens)
        name = "share of the reward margin explained by answer length"
        checks.append(require("length_share", name, share, "<=", MAX_LENGTH_SHARE, "warn"))
    return checks


def policy_changed(before: Evaluation, after: Evaluation) -> Check:
    """An adapter that is not active changes nothing."""
    if before.logps is None or after.logps is None:
        changed = sum(b != a for b, a in zip(before.answers, after.answers, strict=True)) / len(after.answers)
        return require("answers_changed", "share of generated answers that changed", changed, ">", 0, "warn")
    change = mean_logp_change(before.logps, after.logps)
    return require("policy_changed", "mean change of answer log-prob (nats/token)", change, ">=", MIN_CHANGE)


def mean_logp_change(before: Logps, after: Logps) -> float:
    """Mean absolute change of the answers' log-probs, nats/token."""
    return torch.cat(logp_drops(before, after)).abs().mean().item()


def logp_drops(before: Logps, after: Logps) -> list[torch.Tensor]:
    """What the chosen and, where there are any, the rejected answers lost, nats/token: (rows,) each."""
    return [own - after.per_token[side] for side, own in before.per_token.items()]


def image_reliance(before: Mapping[str, Ratio], after: Mapping[str, Ratio]) -> list[Check]:
    """Does the image still decide? Measured with another row's image where there is one, else a blank one.

    One that misleads fails as one that is ignored does; where chance alone may have made it negative, it is a warning.
    """
    name = next((key for key in ("wrong_image_drop", "blank_image_drop") if key in after), None)
    if name is None:
        return []
    label = "image contribution to the chosen answer (nats/token)"
    low, high = intervals({name: after[name]})[name]
    detail = f"95 % CI {low:.2g} to {high:.2g}"
    checks = [require("image_contribution", label, after[name].value, ">", 0, "fail" if high <= 0 else "warn", detail)]
    if before[name].value > MIN_CONTRIBUTION:
        share = after[name].value / before[name].value
        label = "image reliance kept after tuning (share of base)"
        checks.append(require("image_reliance", label, share, ">=", MIN_RELIANCE, "warn"))
    return checks


def reward_image_contribution(
    model: Any, held_out: HeldOut, answers: Sequence[str], score: Scorer, max_new_tokens: int
) -> list[Check]:
    """Do answers earn more by their images than by blank ones? Nothing where no row is scored, or has no image.

    Args:
        answers: the tuned model's, greedy, to the first held-out rows.
    """
    if "truth" not in held_out.preferences.test.column_names:
        return []
    blank = held_out.blank_answers(model, min(ABLATED_ROWS, len(answers)), Sampling(max_new_tokens))
    if not blank:
        return []
    _, own = held_out.scores(answers[: len(blank)], score)
    _, other = held_out.scores(blank, score)
    gains = [mine - theirs for mine, theirs in zip(own, other, strict=True) if None not in (mine, theirs)]  # type: ignore[operator]
    if not gains:
        return []
    name = "reward of the answers minus that of answers to blank images"
    detail = "reward unchanged when the picture is blank"
    return [require("reward_image_contribution", name, sum(gains) / len(gains), ">", 0, "warn", detail)]


def squared_correlation(values: torch.Tensor, by: torch.Tensor) -> float:
    """The squared correlation of two (rows,) tensors, 0 where one of them does not vary."""
    x, y = values.double() - values.double().mean(), by.double() - by.double().mean()
    norm = (x @ x) * (y @ y)
    return ((x @ y) ** 2 / norm).item() if norm > 0 else 0.0


def check_adapter_reload(model: "PeftModel", folder: Path, held_out: HeldOut, tuned: Logps) -> Check:
    """Whether the saved adapter is the trained one: it is loaded into the model, and a batch is scored again.

    Args:
        folder: the run's, with `adapter/`.
        tuned: of the held-out rows in the same batches, from before the adapter was saved.
    """
    reload_adapter(model, folder)
    count = min(held_out.batch_size, len(held_out))
    reloaded = held_out.logps(model, count)
    sides = [side for side in SIDES if getattr(tuned, side) is not None]
    errors = ((getattr(reloaded, side) - getattr(tuned, side)[:count]).abs().max() for side in sides)
    name = "saved adapter, reloaded: largest log-prob error (nats)"
    return require("adapter_reload", name, max(errors).item(), "<=", MAX_RELOAD_ERROR)


def check_answers_reload(model: "PeftModel", folder: Path, held_out: HeldOut, max_new_tokens: int) -> Check:
    """As `check_adapter_reload`, where rows have no pair of answers: by greedy answers to the first rows."""
    sampling = Sampling(max_new_tokens)
    tuned = held_out.answers(model, RELOADED_ROWS, sampling)
    reload_adapter(model, folder)
    reloaded = held_out.answers(model, RELOADED_ROWS, sampling)
    differ = sum(mine != theirs for mine, theirs in zip(reloaded, tuned, strict=True))
    name = f"saved adapter, reloaded: answers that differ, of {len(tuned)}"
    return require("adapter_reload", name, differ, "<=", 0)


def reload_adapter(model: "PeftModel", folder: Path) -> None:
    """PEFT loads the saved adapter into the model; its tensors are zeroed first, lest one that the file lacks stays."""
    from peft import load_peft_weights, set_peft_model_state_dict

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    set_peft_model_state_dict(model, load_peft_weights(str(folder / "adapter"), device=str(model.device)))
