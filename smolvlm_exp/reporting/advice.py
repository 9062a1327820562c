"""After a run: signs of common problems in its own metrics, and which setting to change. No sign, no advice."""

from collections.abc import Iterator
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from smolvlm_exp.evaluation.metrics import metric_of
from smolvlm_exp.reporting.on_policy import on_policy_signs
from smolvlm_exp.runs.event_log import read_events
from smolvlm_exp.runs.find import saved_hydra, summary_of
from smolvlm_exp.utils.errors import RequestError, isolated
from smolvlm_exp.utils.formatting import as_finite

Events = list[dict[str, Any]]  # of metrics.jsonl, by step

MIN_EVENTS = 5  # logged before a curve can be judged
GRADIENT_SPIKE = 10.0  # of a gradient norm over the median
LOSS_RISE = 1.5  # of the loss over its first
MIN_ACCURACY = 0.6  # reward accuracy in training that is more than chance and its noise
MIN_MARGIN = 0.5  # nats that a chosen answer gains over its rejected one (1.6 times as likely) once a policy has moved
MAX_WAIT = 0.2  # share of the time spent waiting for batches
HELD_OUT_RISE = 0.05  # of the held-out loss over its lowest
CHECKPOINT_TILES = {"embedded": 2}  # along an image's long edge, where it is not 4
REWARD_FOR = {  # metric -> the reward that holds it
    "attribute_accuracy": "attributes", "repeat_rate": "repetition", "recall": "objects", "chair_s": "objects",
    "yes_no_accuracy": "yes_no", "answer_accuracy": "exact_match",
}  # fmt: skip
OLD_NAMES = {  # summaries written before checks had ids have these names alone
    "likelihood_displacement": "fall of chosen answers' log-probability, nats a token",
    "image_reliance": "share of it that is left after tuning",
}


def advise(summary: dict[str, Any], config: dict[str, Any], events: Events) -> list[str]:
    """For each sign that is there, a sentence with the figures and one with the setting to change.

    Args:
        summary: what summary.json holds; config: the resolved config; events: metrics.jsonl's.
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
        reward_without_image,
        on_policy,
        unrewarded,
        warmup_only,
    )
    advice: list[str] = []
    for sign in signs:
        with isolated(f"advice ({sign.__name__})"):
            advice += sign(summary, config, events)
    return advice


def advise_run(folder: Path) -> list[str]:
    """The advice on a run, from its folder alone."""
    config = saved_hydra(folder, "config")
    if not config:
        raise RequestError(f"run={folder}: its settings are missing (.hydra/config.yaml).")
    return advise(summary_of(folder), config, read_events(folder / "metrics.jsonl"))


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
        options = []
        if config["trainer"].get("engine") == "stock":
            options += ["trainer.engine=shared", "trainer.gradient_checkpointing=true"]
        if config["quant"].get("load_in_4bit") is not True:
            options.append("quant=nf4")
        if config["adapter"].get("target") != "text":
            options.append("adapter.target=text")
        options += smaller_images(config["model"])
        yield f"Out of memory.\nTry, in this order: {', '.join(options)}; task=plan predicts how much each needs."


def smaller_images(model: dict[str, Any]) -> Iterator[str]:
    """Half the resolution, in whole tiles, where images have more than one."""
    tile = (model.get("shape") or {}).get("image_size")
    if tile:
        tiles = (model.get("longest_edge") or tile * CHECKPOINT_TILES.get(model["id"], 4)) // tile
        if tiles > 1:
            yield f"model.longest_edge={tiles // 2 * tile} (fewer tiles per image)"


def not_finite(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    broken = {e["step"] for e in events for key in ("loss", "grad_norm") if key in e and as_finite(e[key]) is None}
    skipped = summary.get("train", {}).get("not_finite") or sorted(broken)
    if skipped:
        steps = ", ".join(map(str, skipped[:8])) + (" ..." if len(skipped) > 8 else "")
        yield (
            f"NaN or infinite loss or gradient at step {steps}: those steps were skipped.\n"
            "Check the rows named in the log; if they are fine, try trainer.learning_rate="
            f"{config['trainer']['learning_rate'] / 4:g}."
        )


def unstable(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    """One large gradient, or a loss that rose and stayed up for three logged events."""
    norms, losses = logged(events, "grad_norm"), logged(events, "loss")
    if any("reward" in event for event in events):
        losses = []  # GRPO's is near 0 whatever it learns
    rate = config["trainer"]["learning_rate"]
    if len(norms) >= MIN_EVENTS:
        usual, (largest, step) = median(norm for norm, _ in norms), max(norms)
        if largest > GRADIENT_SPIKE * usual > 0:
            yield (
                f"unstable: the gradient norm reached {largest:.3g} at step {step} (median {usual:.3g}).\n"
                f"Try trainer.max_grad_norm={usual * 2:.2g}, a longer warmup (trainer.warmup_steps=0.1), or "
                f"trainer.learning_rate={rate / 2:g}."
            )
            return
    if len(losses) >= MIN_EVENTS:
        first = losses[0][0]
        high, step = max((min(three)[0], three[1][1]) for three in zip(losses, losses[1:], losses[2:], strict=False))
        if high > LOSS_RISE * first > 0:
            yield (
                f"unstable: the loss was {first:.3g} at first and rose to {high:.3g} and more around step {step}.\n"
                f"Try trainer.learning_rate={rate / 4:g}, or a longer warmup (trainer.warmup_steps=0.1)."
            )


def slow_convergence(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    """Not better than chance, or hardly moved: a tiny step the right way wins most pairs too. What broke isn't slow."""
    accuracies, margins = logged(events, "rewards/accuracies"), logged(events, "rewards/margins")
    if len(margins) < 2 * MIN_EVENTS or any(list(sign(summary, config, events)) for sign in (not_finite, unstable)):
        return
    accuracy, margin = (sum(v for v, _ in values[-MIN_EVENTS:]) / MIN_EVENTS for values in (accuracies, margins))
    rate, least = config["trainer"]["learning_rate"], MIN_MARGIN * config["trainer"]["beta"]
    if -least < margin and (accuracy < MIN_ACCURACY or margin < least):
        yield (
            f"slow convergence: after {events[-1]['step']} steps at learning rate {rate:g} the reward accuracy on "
            f"training pairs is {accuracy:.0%} and the margin {margin:.2g}.\n"
            f"Try trainer.learning_rate={10 * rate:g}, then more epochs (trainer.num_train_epochs)."
        )


def data_starvation(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    waits = [share for share, _ in logged(events, "data_wait")[1:]]  # the first counts the start of the workers
    share = sum(waits) / len(waits) if waits else 0.0
    if share > MAX_WAIT:
        trainer = config["trainer"]
        workers = trainer["dataloader_num_workers"]
        more = 4 if workers == 0 else 2 * (workers or 8)  # null: at most 8
        yield (
            f"data starvation: training waited for batches {share:.0%} of the time.\n"
            f"Try trainer.dataloader_num_workers={more}, or a larger "
            f"trainer.cache_ram (it is {trainer['cache_ram']})."
        )


def overfitting(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    held_out = logged(events, "eval_loss")
    if len(held_out) < 3:
        return
    (lowest, step), (last, _) = min(held_out), held_out[-1]
    if last > (1 + HELD_OUT_RISE) * lowest:
        yield (
            f"overfitting: held-out loss was lowest at step {step} ({lowest:.4g}) and ended at {last:.4g}.\n"
            f"Stop there with trainer.max_steps={int(step)}, or add training rows."
        )


def likelihood_displacement(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    drop = warned(summary, "likelihood_displacement")
    if drop is not None:
        trainer, options = config["trainer"], []
        losses = trainer.get("loss_type", [])
        if losses and "sft" not in losses:
            weights = ",".join(["1"] * len(losses))
            options.append(f"trainer.loss_type=[{','.join(losses)},sft] trainer.loss_weights=[{weights},1]")
        if "beta" in trainer:
            options.append(f"trainer.beta={3 * trainer['beta']:g}")
        options.append(f"trainer.learning_rate={trainer['learning_rate'] / 2:g}")
        yield f"likelihood displacement: chosen answers lost {drop:.2g} nats/token.\nTry {', or '.join(options)}."


def low_image_reliance(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    share = warned(summary, "image_reliance")
    if share is not None:
        yield (
            f"the model relies on the image {max(share, 0):.0%} as much as the base does.\n"
            "Prefer pairs that differ in what the image shows, not in style; or lower trainer.learning_rate="
            f"{config['trainer']['learning_rate'] / 2:g}."
        )


def reward_without_image(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    gain = warned(summary, "reward_image_contribution")
    if gain is not None:
        yield (
            f"answers to blank images earn as much as those to the rows' own ({-gain:+.2g}): the reward does not need "
            "the image.\n"
            "Use rows whose answers cannot be guessed from the question, or +reward.weights.image_dependence=0.5."
        )


def on_policy(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    yield from (sentence for _, sentence in on_policy_signs(config["trainer"], events))


def unrewarded(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    """What no reward names may drift while those that are named rise: the reward is hacked (arXiv 2210.10760)."""
    if not any("reward" in event for event in events):
        return
    weights = config.get("reward", {}).get("weights", {})
    for key, change in summary.get("changes", {}).items():
        reward = REWARD_FOR.get(key)
        good = metric_of(key).good
        fell = max(change["low"] * good, change["high"] * good) < 0  # the whole interval
        if reward and fell:
            weight = weights.get(reward, 0.0)
            more = f"reward.weights.{reward}={2 * weight:g}" if weight else f"+reward.weights.{reward}=0.5"
            before, after = summary["before"][key], summary["after"][key]
            yield f"{key} went from {before:.3g} to {after:.3g} while rewards rose.\nTry {more}."


def warmup_only(summary: dict[str, Any], config: dict[str, Any], events: Events) -> Iterator[str]:
    """Warmup rises from 0, and a fraction of all steps is rounded up: the only step of a run has rate 0."""
    steps, rates = summary.get("train", {}).get("steps"), logged(events, "learning_rate")
    if summary.get("status") != "done" or not steps or not rates:
        return
    warmup, highest = config["trainer"]["warmup_steps"], max(rates)[0]
    if (warmup if warmup >= 1 else ceil(warmup * steps)) >= steps and highest < config["trainer"]["learning_rate"]:
        yield (
            f"warmup: the learning rate was still rising at the last of {steps} step{'s' * (steps > 1)}; it was "
            f"{highest:.3g} at most.\nTry trainer.warmup_steps=0, or more steps (trainer.max_steps)."
        )


def logged(events: Events, key: str) -> list[tuple[float, Any]]:
    """(value, step) wherever a metric was logged and is finite; NaN stands in the log as null."""
    return [(value, e["step"]) for e in events if (value := as_finite(e.get(key))) is not None]


def warned(summary: dict[str, Any], id: str) -> float | None:
    """The value of a check whose verdict is `warn`, None where it is not."""
    checks = (c for c in summary.get("checks", []) if isinstance(c, dict) and c.get("verdict") == "warn")
    named = (c for c in checks if c.get("id") == id or c.get("name") == OLD_NAMES.get(id, ""))
    return next((as_finite(c.get("value")) for c in named), None)
