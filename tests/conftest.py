"""What the tests share: composing a configuration, running the command people type, and the embedded model."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest

from smolvlm_exp.config.compose import check_command, register_schemas, search_path
from smolvlm_exp.config.schema import Config, parse
from smolvlm_exp.utils.startup import configure_logging, fast_imports

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: one process a core is faster than two threads in one
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

imports = contextlib.ExitStack()
imports.enter_context(fast_imports())  # until all tests are collected
register_schemas()
configure_logging()

# Three steps without warm-up: LoRA's A has no gradient until B has left zero.
QUICK = (
    "tracker=none", "data.train_rows=16", "data.test_rows=4", "trainer.max_steps=3", "trainer.warmup_steps=0",
    "trainer.logging_steps=1", "trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=8",
    "trainer.save_strategy=no", "trainer.sample_steps=0", "task.max_new_tokens=8",
)  # fmt: skip
MADE_ONCE = {"whole": "command", "command": "command", "run": "run", "tuned": "tuned", "graphs": "graphs"}
SIGMOID = ("trainer.loss_type=[sigmoid]", "trainer.loss_weights=null")


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in this hook too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests over one of `MADE_ONCE`, fixtures of many seconds, stay in one of xdist's processes (--dist loadgroup)."""
    for item in items:
        for name in MADE_ONCE.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(MADE_ONCE[name]))


def pytest_make_parametrize_id(val: object) -> str | None:
    """A long text's beginning; pytest numbers those that are alike."""
    return f"{val[:40]!r}..." if isinstance(val, str | bytes) and len(val) > 80 else None


def pytest_collection_finish() -> None:
    imports.close()
    gc.set_threshold(20_000)  # composing alone makes that many objects that last


def compose(*overrides: str, multirun: bool = False) -> Config:
    """The configuration a command with these overrides would run; of many, the first."""
    return checked(*overrides, multirun=multirun) if overrides else deepcopy(defaults())


@cache
def defaults() -> Config:
    """That of a command without any."""
    return checked()


def checked(*overrides: str, multirun: bool = False) -> Config:
    args = SimpleNamespace(
        overrides=list(overrides), multirun=multirun, config_path=None, config_name=None, config_dir=None
    )
    return check_command(args)[0]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_lines(folder / "metrics.jsonl") if "loss" in event]


@pytest.fixture
def quick(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Callable[..., Config]:
    """A configuration of the default cut down to seconds, on `small`; runs keep what they share in one folder."""
    own = (*QUICK, f"trainer.cache={tmp_path_factory.getbasetemp() / 'cache'}", f"model.id={small}")

    def composed(*overrides: str) -> Config:
        with search_path():  # once, where a command is composed three times to tell its mistakes
            return parse(hydra.compose("config", overrides=[*own, *overrides]))

    return composed


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float | None]]:
    """The progress bars that a terminal would have shown, by label: how far the last one came, and its total."""
    from rich.progress import Progress

    from smolvlm_exp.utils import progress

    ended: dict[str, tuple[float, float | None]] = {}
    monkeypatch.setattr(progress, "somebody_watches", lambda: True)
    monkeypatch.setattr(progress, "DELAY", 3600.0)
    monkeypatch.setattr(
        Progress, "stop", lambda bar: ended.update({t.description: (t.completed, t.total) for t in bar.tasks})
    )
    return ended


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that only train: they are not evaluated before and after, which takes most of a short run's time."""
    import torch

    from smolvlm_exp.evaluation.held_out import Evaluation
    from smolvlm_exp.evaluation.preference import Logps

    looks: list[Evaluation] = []

    def look(*args, **kwargs):
        sides = torch.tensor([[-1.0], [-2.0]]) * (1 + len(looks))  # an adapter that is on moves what it says
        looks.append(Evaluation({}, Logps(*sides, *torch.full((2, 1), 50.0)), ["A star."] * 4))
        return looks[-1]

    monkeypatch.setattr("smolvlm_exp.tasks.result.evaluate", look)
    monkeypatch.setattr("smolvlm_exp.tasks.result.Result.reload_check", lambda *args: [])


class CommandServer:
    """Runs `python -m smolvlm_exp ...`, one after the other, in forks of one process (command_server.py).

    Attributes:
        child: the process id of the command that runs now, or ran last.
    """

    child = 0

    def __init__(self, folder: Path) -> None:
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        command = [sys.executable, "-m", "tests.command_server"]
        root = Path(__file__).parent.parent
        environment = {**os.environ, "PYTHONHASHSEED": "77"}  # other than this process's
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
        )

    def run(self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float):
        assert self.server.stdin
        assert self.server.stdout
        for path in (self.stdout, self.stderr):
            path.write_text("")
        output = {"stdout": str(self.stdout), "stderr": str(self.stderr)}
        request = {"arguments": arguments, "cwd": str(cwd), "env": dict(env), **output}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        self.child = int(self.server.stdout.readline())
        watchdog = threading.Timer(timeout, os.kill, (self.child, signal.SIGKILL))
        watchdog.start()
        code = int(self.server.stdout.readline())
        watchdog.cancel()
        return subprocess.CompletedProcess(arguments, code, self.stdout.read_text(), self.stderr.read_text())


@pytest.fixture(scope="session")
def command_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    commands = CommandServer(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.server.terminate()
    commands.server.wait()


@pytest.fixture
def command(tmp_path: Path, command_server: CommandServer) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m smolvlm_exp ...`, typed in an empty folder; `fresh`: with an interpreter of its own."""

    def run(
        *arguments: str,
        cwd: Path = tmp_path,
        env: dict[str, str] | None = None,
        timeout: float = 240,
        fresh: bool = False,
    ):
        environment = {**os.environ, **(env or {})}
        if not fresh:
            return command_server.run(arguments, cwd, environment, timeout)
        typed = [sys.executable, "-m", "smolvlm_exp", *arguments]
        return subprocess.run(typed, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def processor():
    from smolvlm_exp.models.model import load_processor

    return load_processor(compose().model)


@pytest.fixture(scope="session")
def loaded_model():
    from smolvlm_exp.models.model import load_model

    return load_model(compose().model)


@pytest.fixture
def model(loaded_model):
    """The embedded model, the test's own."""
    return deepcopy(loaded_model)


@pytest.fixture(scope="session")
def rows(processor, tmp_path_factory):
    """48 checked training rows and 16 held-out ones of the embedded data."""
    from smolvlm_exp.data.preferences import load_preferences

    config = compose("data.train_rows=48", "data.test_rows=16").data
    return load_preferences(config, processor, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def small(processor, tmp_path_factory) -> Path:
    """A folder with the embedded model cut down to two layers and one: as ONNX it is written in seconds."""
    from smolvlm_exp.models.model import load_model

    model = load_model(compose().model)
    core = model.model
    core.text_model.layers = core.text_model.layers[:2]
    core.vision_model.encoder.layers = core.vision_model.encoder.layers[:1]
    model.config.text_config.num_hidden_layers, model.config.vision_config.num_hidden_layers = 2, 1
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def graphs(small, processor, tmp_path_factory):
    """`small` as ONNX in float32, int8 and int4: made once for all processes of a test run."""
    from filelock import FileLock

    from smolvlm_exp.deploy.export.onnx_export import Graphs
    from smolvlm_exp.deploy.options import PARTS
    from smolvlm_exp.deploy.session.backends import load_folder

    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(root / "graphs.lock"):
        if not (root / "graphs" / "onnx").is_dir():
            made = Graphs(root / "graphs.part", load_folder(small, None)[0].model, processor)
            for precision in ("int8", "int4"):
                made.files(dict.fromkeys(PARTS, precision))
            (root / "graphs.part").rename(root / "graphs")
    return root / "graphs"
