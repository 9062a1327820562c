"""What no setting may hold: secrets, which would end up in W&B, reports and logs, and code to run; and what it may hold
only if somebody typed it."""

import os
import re
from collections.abc import Collection
from importlib import import_module
from typing import Any

from smolvlm_exp.utils.errors import RequestError

NAMES = re.compile(r"(^|_)(token|api_?key|secret|password|passwd|credentials?)$", re.IGNORECASE)
VALUES = re.compile(
    r"hf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}|://[^/\s:@]+:[^/\s@]+@"
)
HELD = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")  # names of environment variables whose values are secrets
CODE = (
    "_target_", "trust_remote_code", "code_revision", "custom_generate", "use_kernels", "kernel_config",
    "megatron_config",
)  # fmt: skip
LOADED = re.compile(r"LD_|DYLD_|PYTHON|PATH$")  # environment variables that make a process load other code
# Code to run, where answers, pairs and models are sent, and which secret goes with them: a file that came along does
# not decide that.
TYPED = ("reward.user", "reward.judge.url", "reward.judge.key_variable", "export.push_to_hub", "task.push_to_hub")
OWN = ("hydra", "hydra_plugins", "logging")
CALLS = ("_target_", "()", "class")  # what Hydra and `logging` call, by its name
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")  # `logging` imports whatever else follows ext://
OUTPUT = "${hydra.runtime.output_dir}/"  # how Hydra's own log files begin; other interpolations could spell ext://


def check_setting(key: str, value: Any) -> None:
    """Refuse a setting, by its full name, that holds a secret or would run code that is no part of this program."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            check_setting(f"{key}.{name}", item)
        return
    last = key.rpartition(".")[2]
    loads = ".env_set." in key and LOADED.search(last)
    if loads or last in CODE or (last == "attn_implementation" and "/" in str(value)):
        raise RequestError(f"{key} is not supported: it would run code that is no part of this program.")
    if value in (None, "", False):
        return
    text = str(value)
    secrets = (value for name, value in os.environ.items() if HELD.search(name) and len(value) >= 16)
    if NAMES.search(last) or VALUES.search(text) or any(secret in text for secret in secrets):
        raise RequestError(
            f"{key} is a secret, and settings are written to logs, reports and W&B.\n"
            "Give it in the environment: HF_TOKEN, WANDB_API_KEY, SMOLVLM_EXP_API_KEY (of task=serve)."
        )


def check_typed(key: str, value: Any, typed: Collection[Any]) -> None:
    """Refuse a value of one of `TYPED` that is not among those that the command itself gives this setting."""
    if key in TYPED and value not in (None, "", "null", *typed):
        raise RequestError(
            f"{key}={value} is set by a file or a saved run. It names code to run, or what is sent where, so it "
            f"counts only where it is typed.\nRead what it names, then type {key}={value} (or {key}=null)."
        )


def check_hydra(node: Any, path: str = "hydra") -> None:
    """Refuse, in Hydra's own settings, calls of anything else, imports by the environment, and secrets."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        key = f"{path}.{name}"
        if calls_others(key, value):
            raise RequestError(f"{key}={value} is refused: it would run code that is no part of this program.")
        if path.endswith("env_set"):
            check_setting(key, value)
        check_hydra(value, key)


def calls_others(key: str, value: Any) -> bool:
    """Whether one of Hydra's settings calls or imports anything but Hydra and `logging`."""
    path, _, name = key.rpartition(".")
    if name in CALLS:
        return not is_own(str(value))
    if name == "env_set":
        return isinstance(value, str)  # an interpolation, whose value cannot be checked
    if path.endswith("env_set"):
        return bool(LOADED.search(name))
    if not isinstance(value, str) or "_logging" not in key:
        return False
    return ("ext://" in value and value not in STREAMS) or ("${" in value and not value.startswith(OUTPUT))


def is_own(target: str) -> bool:
    """Whether this names a class that Hydra, its plugins or `logging` define, not one that their modules import."""
    module, _, name = target.rpartition(".")
    if module.partition(".")[0] not in OWN:
        return False
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return False
    return isinstance(cls, type) and cls.__module__.partition(".")[0] in OWN


def check_search_path(text: str) -> None:
    """Refuse a setting or file by which Hydra searches a Python package for files: it would import the package."""
    if "pkg://" in text:
        raise RequestError("hydra.searchpath: pkg:// is refused: it would run code that is no part of this program.")
