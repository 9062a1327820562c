"""A reward function of your own, from a Python file that you name on the command line (docs/rewards.md)."""

import hashlib
import inspect
import logging
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from smolvlm_exp.rewards.completions import Reward
from smolvlm_exp.utils.errors import RequestError, first_line, suggestion

log = logging.getLogger(__name__)

HOW = "Write it as reward.user=FILE.py:FUNCTION."


def load_user(user: str) -> tuple[str, Reward, str]:
    """`reward.user`'s function.

    Returns:
        its name, the function, and the SHA-256 of its file, as it was read to be run.

    Raises:
        RequestError: it cannot be loaded; the message says why.
    """
    if "://" in user:
        raise RequestError(f"reward.user={user}: nothing is run from a URL. Download it, read it, and name the file.")
    file, _, name = user.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not file.endswith(".py") or not name:
        raise RequestError(f"reward.user={user} names no function of a file. {HOW}")
    if not path.is_file():
        raise RequestError(f"reward.user={user}: there is no file {path}.")
    content = path.read_bytes()
    log.info(f"reward.user: running {path}")
    module = run_module(path, content)
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if name not in functions:
        raise RequestError(f"reward.user={user}: the file has no function {name}. {suggestion(name, functions)}")
    function: Reward = getattr(module, name)
    if inspect.iscoroutinefunction(function):
        raise RequestError(f"reward.user={user}: {name} is async, and rewards are called one after the other: use def.")
    return name, function, hashlib.sha256(content).hexdigest()


def run_module(path: Path, content: bytes) -> ModuleType:
    """A file's module, made of these very bytes: a .pyc beside the file, whatever it holds, is not read."""
    spec = spec_from_file_location(f"reward_user_{path.stem}", path)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look theirs up
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        where = f"{type(error).__name__}: {first_line(error)}"
        raise RequestError(f"reward.user: {path} cannot be run ({where}).") from error
    return module
