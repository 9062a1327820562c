"""P9: W&B down, slow, logged out or failing half-way never stops or slows a run; a resumed one goes on there."""

import json
import os
import socket
import subprocess
import sys
import time
from asyncio import CancelledError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from smolvlm_exp.reporting.trackers import background, wandb
from smolvlm_exp.reporting.trackers.base import TrackedRun
from smolvlm_exp.reporting.trackers.config import TrackerConfig
from smolvlm_exp.reporting.trackers.tracker import Tracker
from smolvlm_exp.reporting.trackers.wandb import run_id
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose

DONE = {"status": "stopped", "before": {}, "after": {"recall": 1.0}, "train": {}, "checks": []}


class Client:
    """W&B's run, as far as it is used; it fails, or takes its time, where it is told to."""

    offline = False
    dir = "somewhere/files"

    def __init__(self, fails_at=None, seconds=0.0):
        self.fails_at, self.seconds, self.logged, self.summary, self.ended = fails_at, seconds, [], {}, None

    def log(self, values, step=None):
        time.sleep(self.seconds)
        if len(self.logged) == self.fails_at:
            raise ConnectionError("the network went away")
        self.logged.append((step, values))

    def define_metric(self, name, summary):
        """Its columns, once the run is there."""

    def finish(self, exit_code=0):
        self.ended = exit_code


def track(monkeypatch, folder, open, patience=5.0, steps=50):
    """A run of so many steps with that W&B: seconds of the steps, seconds of the end."""
    monkeypatch.setattr(wandb, "init_run", open)
    monkeypatch.setattr(background, "PATIENCE", patience)
    tracker = Tracker(TrackerConfig(wandb=True), TrackedRun(folder, "a run"))
    began = time.monotonic()
    for step in range(steps):
        tracker.log({"loss": 1.0 / (step + 1)}, step)
    took = time.monotonic() - began
    tracker.finish(DONE)
    return took, time.monotonic() - began - took


def test_all_is_handed_over_in_its_order(monkeypatch, tmp_path):
    client = Client()
    track(monkeypatch, tmp_path, lambda *a: client)
    assert [step for step, _ in client.logged] == list(range(50))
    assert client.summary == {"after/recall": 1.0, "status": "stopped"}
    assert client.ended == 0


def test_a_client_that_fails_half_way(monkeypatch, tmp_path, capsys):
    client = Client(fails_at=20)
    took, ended = track(monkeypatch, tmp_path, lambda *a: client)
    assert len(client.logged) == 20
    assert took + ended < 1
    assert capsys.readouterr().out.count("W&B failed (the network went away); nothing more is sent") == 1


def test_a_client_that_is_slow(monkeypatch, tmp_path, capsys):
    took, ended = track(monkeypatch, tmp_path, lambda *a: Client(seconds=0.2), patience=0.5)
    assert took < 0.1
    assert 0.4 < ended < 2
    assert "W&B did not answer within 0.5 s; giving up" in capsys.readouterr().out


@pytest.mark.parametrize("error", [SystemExit(1), RuntimeError("no way"), KeyError("x"), CancelledError()])
def test_one_that_cannot_begin(monkeypatch, tmp_path, capsys, error):
    def failing(*args):
        raise error

    took, ended = track(monkeypatch, tmp_path, failing)
    assert took + ended < 1
    assert "nothing more is sent" in capsys.readouterr().out


def test_one_that_never_begins(monkeypatch, tmp_path, capsys):
    took, ended = track(monkeypatch, tmp_path, lambda *a: time.sleep(60), patience=0.3)
    assert took < 0.1
    assert ended < 2


def test_a_resumed_run_goes_on_with_the_same_run(monkeypatch, tmp_path):
    asked = []
    for _ in range(2):
        track(monkeypatch, tmp_path, lambda *a: asked.append(a[-1]["id"]) or Client(), steps=1)
    assert asked[0] == asked[1] == run_id(tmp_path)
    assert run_id(tmp_path / "another") != asked[0]
    given = {}
    monkeypatch.undo()
    monkeypatch.setattr("wandb.init", lambda **kwargs: given.update(kwargs))
    wandb.init_run(TrackerConfig(), tmp_path, {"id": asked[0]})
    assert (given["id"], given["resume"]) == (asked[0], "allow")


SCRIPT = """
import sys, time
from pathlib import Path
from smolvlm_exp.reporting.trackers import background, wandb
from smolvlm_exp.reporting.trackers.base import TrackedRun
from smolvlm_exp.reporting.trackers.config import TrackerConfig
from smolvlm_exp.reporting.trackers.tracker import Tracker
import transformers.integrations.integration_utils
wandb.INIT_TIMEOUT, background.PATIENCE = 5.0, 20.0
tracker = Tracker(TrackerConfig(wandb=True), TrackedRun(Path(sys.argv[1]), "a run"))
began = time.monotonic()
for step in range(50):
    tracker.log({"loss": 1.0 / (step + 1)}, step)
print("took", time.monotonic() - began)
tracker.finish({"status": "stopped"})
print("ended", time.time())
"""


@pytest.mark.parametrize("server", ["closed", pytest.param("hanging", marks=pytest.mark.slow)])
def test_the_real_client_with_a_server_that_does_not_serve(tmp_path, command, server):
    """Nothing is lost: what could not be sent lies in an offline run beside the run's own files."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if server == "hanging":
            listening.listen(50)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        env = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}
        began = time.monotonic()
        done = command("-c", SCRIPT, str(tmp_path), env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("took ")[1].split()[0]) < 0.1
    assert "W&B: offline (" in done.stdout + done.stderr
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert time.monotonic() - began < 60
    assert time.time() - float(done.stdout.split("ended ")[1].split()[0]) < 10  # no exit hook of W&B's waits too


class Half(BaseHTTPRequestHandler):
    """A server that takes a run, and then nothing more."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        if "file_stream" in self.path or b"CreateRunFiles" in asked:
            time.sleep(300)
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        run = {"id": "r", "name": "r", "displayName": "r", "config": "{}", "project": project}
        answer = json.dumps({"data": {"model": None, "upsertBucket": {"bucket": run, "inserted": True}}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        """Nothing."""


@pytest.mark.slow
def test_after_a_failure_here_python_does_not_wait_for_the_server(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Half) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        env = {**os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}
        script = SCRIPT.replace("20.0", "3.0").replace("tracker.finish", "tracker.put(lambda _: 1 / 0)\ntracker.finish")
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path], env=env, capture_output=True, text=True, timeout=60
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("wandb/run-*"))  # it was online
    assert "W&B failed (division by zero)" in done.stderr
    assert time.time() - float(done.stdout.split("ended ")[1].split()[0]) < 15


@pytest.mark.parametrize(
    ("override", "environment", "message"),
    [
        ("tracker.project=a/b", {}, "tracker.project=a/b: at most 128 letters, and none of /"),
        ("tracker.project=''", {}, "tracker.project and tracker.entity: leave them out"),
        ("tracker.tags=['']", {}, "tracker.tags: '' has 0 letters, and W&B takes 1 to 64"),
        (f"tracker.tags=[{'a' * 65}]", {}, "has 65 letters, and W&B takes 1 to 64"),
        ("seed=0", {"WANDB_PROJECT": "a?b"}, "WANDB_PROJECT=a?b: at most"),
        ("seed=0", {"WANDB_MODE": "ofline"}, "WANDB_MODE=ofline: Did you mean offline?"),
        ("seed=0", {"WANDB_BASE_URL": "wandb.our.net"}, "WANDB_BASE_URL=wandb.our.net: it is no address. Write it as"),
        ("seed=0", {"WANDB_BASE_URL": "http://[::1"}, "WANDB_BASE_URL=http://[::1: it is no address"),
        ("seed=0", {"WANDB_BASE_URL": "https://wandb.our.net:http"}, "it is no address. Write it as https://HOST."),
    ],
)
def test_what_wandb_would_refuse_is_refused_before(monkeypatch, override, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError) as refused:
        compose(override)
    assert message in str(refused.value)


SERVICES = """
import sys, time
from pathlib import Path
import psutil
from smolvlm_exp.reporting.trackers import wandb
from smolvlm_exp.reporting.trackers.config import TrackerConfig

for number in range(2):
    run = wandb.init_run(TrackerConfig(), Path(sys.argv[1]), {})
    run.log({"loss": 1.0})
    wandb.finish(run)
    (file,) = Path(run.dir).parent.glob("*.wandb")
    size = file.stat().st_size
    time.sleep(0.5)
    assert size == file.stat().st_size > 1000, (number, size)
run = wandb.init_run(TrackerConfig(), Path(sys.argv[1]), {})
for process in psutil.Process().children():
    process.kill()
time.sleep(0.5)
wandb.finish(wandb.init_run(TrackerConfig(), Path(sys.argv[1]), {}))
"""


def test_wandbs_service(tmp_path):
    """It is not another process's, which may be gone; it has written all when a run ends, and is one that lives."""
    (tmp_path / ".netrc").write_bytes("machine elsewhere login ü password ü".encode("latin-1"))
    (tmp_path / ".netrc").chmod(0o600)
    env = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_API_KEY")}
    env |= {"WANDB_SERVICE": f"3-1-unix-{tmp_path}/gone.sock", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", SERVICES, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 4


def test_wandbs_own_variables_are_heard(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("wandb.init", lambda **options: asked.append(options))
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    for config in (TrackerConfig(), TrackerConfig(project="typed")):
        wandb.init_run(config, tmp_path, {})
    monkeypatch.delenv("WANDB_PROJECT")
    wandb.init_run(TrackerConfig(), tmp_path, {})
    assert [options["project"] for options in asked] == ["theirs", "typed", "smolvlm_exp"]
    assert [options["entity"] for options in asked] == [None] * 3  # W&B then reads WANDB_ENTITY
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert Tracker(TrackerConfig(wandb=True), TrackedRun(tmp_path)).runs == []
    assert not list(tmp_path.iterdir())
