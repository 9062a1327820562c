"""After a run: signs of common problems in its own metrics, and which setting to change. No sign, no advice.

Out of memory, NaNs, unstable training, slow convergence, data starvation, overfitting, likelihood displacement, low
image reliance.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from smolvlm_exp.runs.event_log import read_events

Events = list[dict[str, float]]  # of metrics.jsonl

ENOUGH = 5  # logged events before a curve can be judged
SPIKE = 10.0  # of a gradient norm over the median
RISEN = 1.5  # of the loss over its first
LEARNED = 0.6  # reward accuracy in training that is more than chance and its noise
MOVED = 0.5  # nats that a chosen answer gains over its rejected one before a policy has moved: 1.6 times as likely
WAITED = 0.2  # share of the time spent waiting for batches
RISE = 0.05  # of the held-out loss over its lowest
OLD_NAMES = {  # of the checks that summaries had before checks had ids
    "likelihood_displacement": "fall of chosen answers' log-probability, nats a token",
    "image_reliance": "share of it that is left after tuning",
}


def advise(summary: dict[str, Any], config: dict[str, Any], events: Events) -> list[str]:
    """A sentence with the figures seen and one with the setting to change, for each sign that is there.

    Args:
        summary: what summary.json holds; config: the whole resolved config; events: metrics.jsonl's.
    """
    signs = (
        out_of_memory,
        not_finite,
        unstable,
        slow_convergence,
        data_starvation,
        overfitting,
        likelihood_displacement,
        low_image_reliance,
    )
    return [text for sign in signs for text in sign(summary, config, events)]


def advise_run(folder: Path) -> list[str]:
    """The advice on a run, from its folder alone."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    return advise(summary, config, read_events(folder / "metrics.jsonl"))


def out_of_memory(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    retries = summary.get("train", {}).get("out_of_memory", 0)
    if retries:
        times = "once" if retries == 1 else f"{retries} times"
        yield (
            f"Out of memory {times}; the steps were retried with smaller micro-batches.\n"
            f"trainer.memory_budget={config['trainer']['memory_budget']} left too little for what else uses the GPU: "
            "set a size, e.g. 6GiB."
        )
    reason = str(summary.get("reason", ""))
    if "out of memory" in reason.lower() or "OutOfMemory" in reason:
        trainer, options = config["trainer"], []
        if trainer.get("engine") == "stock":
            options += ["trainer.engine=shared", "trainer.gradient_checkpointing=true"]
        if config["quant"].get("load_in_4bit") is not True:
            options.append("quant=nf4")
        if config["adapter"].get("target") != "text":
            options.append("adapter.target=text")
        options.append(f"data.max_edge={config['data']['max_edge'] // 2} (fewer tiles per image)")
        yield f"Out of memory.\nTry, in this order: {', '.join(options)}; task=plan predicts how much each needs."


def not_finite(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    broken = [e["step"] for e in events for key in ("loss", "grad_norm") if e.get(key, 0) != e.get(key, 0)]
    left_out = summary.get("train", {}).get("not_finite") or sorted(set(broken))
    if left_out:
        rate = config["trainer"]["learning_rate"]
        steps = ", ".join(map(str, left_out[:8])) + (" ..." if len(left_out) > 8 else "")
        yield (
            f"NaN or infinite loss or gradient at step {steps}: those steps were skipped.\n"
            f"Check the rows named in the log; if they are fine, try trainer.learning_rate={rate / 4:g}."
        )


def unstable(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    """One large gradient, or a loss that rose and stayed up for three logged events."""
    norms = [(e["grad_norm"], e["step"]) for e in events if e.get("grad_norm", float("nan")) >= 0]
    losses = [(e["loss"], e["step"]) for e in events if math.isfinite(e.get("loss", math.nan))]
    rate = config["trainer"]["learning_rate"]
    if len(norms) >= ENOUGH:
        usual, (largest, step) = median(norm for norm, _ in norms), max(norms)
        if largest > SPIKE * usual > 0:
            yield (
                f"unstable: the gradient norm reached {largest:.3g} at step {step} (median {usual:.3g}).\n"
                f"Try trainer.max_grad_norm={usual * 2:.2g}, a longer warmup (trainer.warmup_steps=0.1), or "
                f"trainer.learning_rate={rate / 2:g}."
            )
            return
    threes = zip(losses, losses[1:], losses[2:], strict=False)
    risen = max(((min(three)[0], three[1][1]) for three in threes), default=None)
    if len(losses) >= ENOUGH and risen and risen[0] > RISEN * losses[0][0] > 0:
        yield (
            f"unstable: the loss was {losses[0][0]:.3g} at first and rose to {risen[0]:.3g} and more around step "
            f"{risen[1]}.\n"
            f"Try trainer.learning_rate={rate / 4:g}, or a longer warmup (trainer.warmup_steps=0.1)."
        )


def slow_convergence(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    """Not better than chance, or hardly moved: a tiny step the right way wins most pairs too. What broke isn't slow."""
    accuracies = [e["rewards/accuracies"] for e in events if "rewards/accuracies" in e]
    margins = [e["rewards/margins"] for e in events if "rewards/margins" in e]
    if len(margins) < 2 * ENOUGH or any(list(sign(summary, config, events)) for sign in (not_finite, unstable)):
        return
    trainer = config["trainer"]
    accuracy, margin = sum(accuracies[-ENOUGH:]) / ENOUGH, sum(margins[-ENOUGH:]) / ENOUGH
    least = MOVED * trainer["beta"]
    if -least < margin and (accuracy < LEARNED or margin < least):
        yield (
            f"slow convergence: after {events[-1]['step']} steps at learning rate {trainer['learning_rate']:g} the "
            f"reward accuracy on training pairs is {accuracy:.0%} and the margin {margin:.2g}.\n"
            f"Try trainer.learning_rate={10 * trainer['learning_rate']:g}, then more epochs "
            "(trainer.num_train_epochs)."
        )


def data_starvation(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    waits = [e["data_wait"] for e in events if "data_wait" in e][1:]  # the first counts the start of the workers
    share = sum(waits) / len(waits) if waits else 0.0
    if share > WAITED:
        workers = config["trainer"]["dataloader_num_workers"]
        yield (
            f"data starvation: training waited for batches {share:.0%} of the time.\n"
            f"Try trainer.dataloader_num_workers={max(4, 2 * workers)}, or a larger trainer.cache_ram (it is "
            f"{config['trainer']['cache_ram']})."
        )


def overfitting(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    held_out = [(e["eval_loss"], e["step"]) for e in events if "eval_loss" in e]
    if len(held_out) >= 3 and held_out[-1][0] > (1 + RISE) * min(held_out)[0]:
        (lowest, step), (last, _) = min(held_out), held_out[-1]
        yield (
            f"overfitting: held-out loss was lowest at step {step} ({lowest:.4g}) and ended at {last:.4g}.\n"
            f"Stop there with trainer.max_steps={int(step)}, or add training rows."
        )


def likelihood_displacement(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    drop = warned(summary, "likelihood_displacement")
    if drop is not None:
        trainer = config["trainer"]
        losses, changes = trainer.get("loss_type", []), [f"trainer.learning_rate={trainer['learning_rate'] / 2:g}"]
        if "beta" in trainer:
            changes.insert(0, f"trainer.beta={3 * trainer['beta']:g}")
        if losses and "sft" not in losses:
            weights = ",".join(["1"] * len(losses))
            changes.insert(0, f"trainer.loss_type=[{','.join(losses)},sft] trainer.loss_weights=[{weights},1]")
        options = ", or ".join(changes)
        yield f"likelihood displacement: chosen answers lost {drop:.2g} nats/token.\nTry {options}."


def low_image_reliance(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    share = warned(summary, "image_reliance")
    if share is not None:
        yield (
            f"the model relies on the image {max(share, 0):.0%} as much as the base does.\n"
            "Prefer pairs that differ in what the image shows, not in style; or lower trainer.learning_rate="
            f"{config['trainer']['learning_rate'] / 2:g}."
        )


def warned(summary: dict[str, Any], id: str) -> float | None:
    """The value of a check whose verdict is `warn`, None where it is not."""
    checks = (c for c in summary.get("checks", []) if c["verdict"] == "warn")
    return next((c["value"] for c in checks if c.get("id") == id or c["name"] == OLD_NAMES[id]), None)
