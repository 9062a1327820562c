"""Whatever a person types for whatever setting: it is taken, or refused in words; never a stack trace."""

import contextlib
from collections.abc import Iterable
from functools import cache
from types import SimpleNamespace

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smolvlm_exp.config.compose import check_command, explain, search_path
from smolvlm_exp.config.schema import Config, every_key, parse, settings
from smolvlm_exp.config.tasks import TASKS
from smolvlm_exp.config.typed import parsed
from smolvlm_exp.training.dry_run import check_upstream
from smolvlm_exp.training.engine_setup import check_request
from smolvlm_exp.utils.errors import RequestError, unusable_path_as_request_error

ODD = (
    "", "null", "nan", "-inf", "-1", "0", "0.5", "3", "1e30", "99999999999999999999999", "true", "word", "'é ☃ \u202e'",
    "'a/../b'", "[]", "[1,null]", "{}", "{a:[1]}", f"'{'long' * 2000}'",
)  # fmt: skip
TRAINED = ("trainer", "adapter", "quant", "model")  # groups that the checks before a training are about
EXTRA = (
    "trainer.extra.adam_beta2", "trainer.extra.lr_scheduler_kwargs", "trainer.extra.nonsense", "trainer.extra.beta",
    "trainer.extra.optim_args", "adapter.extra.bias", "adapter.extra.nonsense", "adapter.extra.r", "model.extra.dtype",
)  # fmt: skip


VARIANTS = (
    ("trainer=dpo",), ("trainer=sft",), ("trainer=grpo",), ("data=files", "data.folder=x"), ("data=photos",),
    ("data=rlaif_v",), ("data=rlhf_v",), ("data=mmpr", "data.annotations=x", "data.images=x"),
    ("data=pope", "data.images=x", "data.questions=x"), ("data=coco", "data.annotations=x", "data.images=x"),
    ("data=amber", "data.folder=x", "data.images=x"), *((f"task={name}",) for name in TASKS),
)  # fmt: skip


@cache
def composed(*overrides: str):
    with search_path():
        return hydra.compose("config", overrides=["tracker=wandb", *overrides])


def check(config: Config) -> None:
    """What comes before any work."""
    groups = config.trainer, config.model, config.quant, config.adapter
    with unusable_path_as_request_error():
        check_request(*groups)
    check_upstream(config.trainer, config.adapter, config.model.dtype)


def outcome(key: str, text: str, base: tuple[str, ...]) -> Config | str:
    """The settings with this one changed, or what the command line answers."""
    try:
        (override,) = parsed([f"+{key}={text}"])
        config = composed(*base).copy()
        OmegaConf.set_struct(config, False)
        OmegaConf.update(config, key, override.value(), force_add=True)
        return parse(config)
    except RequestError as error:
        return str(error)
    except (HydraException, OmegaConfBaseException) as error:
        return explain(error)


def homes() -> dict[str, tuple[str, ...]]:
    """Each setting, and some of `extra`, with the first options that have it."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(EXTRA, VARIANTS[0])
    for variant in VARIANTS:
        for key, *_ in settings(parse(composed(*variant))):
            found.setdefault(key, variant)
    assert not set(every_key()) - found.keys()
    return found


def try_all(pairs: Iterable[tuple[str, str]]) -> int:
    """Each value for its setting; returns how many were taken, checks and all."""
    home, taken = homes(), 0
    for key, text in pairs:
        try:
            config = outcome(key, text, home[key])
            if isinstance(config, str):
                assert config, "the answer says nothing"
                continue
            if key.partition(".")[0] in TRAINED and config.task.name == "train":
                check(config)
            taken += 1
        except RequestError:
            continue
        except Exception as error:
            raise AssertionError(f"{key}={text[:60]} ends in a stack trace") from error
    return taken


def test_every_setting_takes_or_refuses_an_odd_value():
    keys = sorted(homes())
    assert 0 < try_all((key, ODD[7 * i % len(ODD)]) for i, key in enumerate(keys)) < len(keys)


@pytest.mark.slow
def test_every_setting_takes_or_refuses_every_odd_value():
    try_all((key, text) for key in homes() for text in ODD)


@pytest.mark.slow
def test_odd_values_as_they_are_typed():
    """By the command's own way, which composes a few times."""
    for i, key in enumerate(every_key()):
        args = SimpleNamespace(
            overrides=[f"{key}={ODD[(5 * i + 3) % len(ODD)]}"], multirun=False, config_path=None, config_name=None,
            config_dir=None,
        )  # fmt: skip
        with contextlib.suppress(RequestError):
            check_command(args)
