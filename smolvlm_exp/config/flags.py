"""Words of a command line that begin with dashes: settings typed as flags, `--help GROUP`, what argparse refuses."""

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import NoReturn, get_type_hints

from smolvlm_exp.config.aliases import setting_meant
from smolvlm_exp.config.schema import Config, every_key
from smolvlm_exp.utils.errors import RequestError


def check_flags(words: Sequence[str], parser: ArgumentParser) -> None:
    """Refuse settings that are typed as flags, as `--lr 1e-4`."""
    for i, word in enumerate(words):
        flag, _, value = word.partition("=")
        value = value or next((word for word in words[i + 1 : i + 2] if "=" not in word and word[:1] != "-"), "VALUE")
        if flag.startswith("--") and not any(option.startswith(flag) for option in parser._option_string_actions):
            key = flag[2:].replace("-", "_")
            meant = "" if key in get_type_hints(Config) else setting_meant(key, every_key())
            raise RequestError(f"{flag}: settings are typed without dashes, as {key}={value}. {meant}".rstrip())


def help_wanted(words: Sequence[str]) -> str:
    """The group of `--help GROUP`; empty where that is not what is typed."""
    others = [word for word in words if word not in ("--help", "-h")]
    return others[0] if len(others) == 1 and len(words) == 2 and not others[0].startswith("-") else ""


def refuse_flags(message: str) -> NoReturn:
    """In place of argparse's usage, which is Hydra's, and its exit."""
    raise RequestError(f"{message}. Settings are typed without dashes, as group.key=value; --help lists the options.")
