"""Renamed settings: an old name on the command line is refused with the new one, in a saved run it is translated."""

from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from smolvlm_exp.utils.errors import RequestError

KEYS = {
    "keep": "keep_checkpoints", "session.keep": "session.cache", "task.picture": "task.image_size",
    "model.shape.longest_edge": "model.longest_edge", "tracker.type": "tracker.wandb",
    "task.matmul_tflops": "task.card",
}  # fmt: skip
VALUES: dict[str, dict[Any, Any]] = {
    "export.merge": {"dequantised": "dequantized"}, "data.source": {"rlaif_v": "hub", "rlhf_v": "hub"},
    "tracker.wandb": {"wandb": True, "none": False},
}  # fmt: skip


def check_renamed(key: str, value: str) -> None:
    """Refuse an old name; the `RequestError` has the new one."""
    if key in KEYS:
        raise RequestError(f"{key} is now {KEYS[key]}.")
    if value in VALUES.get(key, {}):
        raise RequestError(f"{key}={value} is now {key}={VALUES[key][value]}.")


def rename_override(override: str) -> str:
    """`keep=all` -> `keep_checkpoints=all`."""
    key, equals, value = override.partition("=")
    new = KEYS.get(key, key)
    return f"{new}{equals}{VALUES.get(new, {}).get(value, value)}"


def rename_settings(composed: DictConfig) -> None:
    """Put a saved configuration's old names right, in place."""
    with open_dict(composed):
        for old, new in KEYS.items():
            group, _, key = old.rpartition(".")
            node = OmegaConf.select(composed, group) if group else composed
            if isinstance(node, DictConfig) and key in node:
                value = node.pop(key)
                # Every run saved a shape, which only random weights read.
                if group != "model.shape" or composed.model.get("weights") == "random":
                    OmegaConf.update(composed, new, value)
        for key, values in VALUES.items():
            value = OmegaConf.select(composed, key)
            if value in values:
                OmegaConf.update(composed, key, values[value])
