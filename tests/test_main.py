"""Whole runs by the command people type: what they leave, replay, stop and resume, sweeps, W&B, the installed wheel."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from hydra._internal.hydra import Hydra

from smolvlm_exp import main
from smolvlm_exp.runs.find import find_run
from smolvlm_exp.tasks.train import train
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import QUICK, compose, read_lines

ROOT = Path(__file__).parent.parent


def losses(folder):
    return {event["step"]: event["loss"] for event in read_lines(folder / "metrics.jsonl") if "loss" in event}


def test_a_run_leaves_what_it_promises_and_replays(command, tmp_path):
    done = command(*QUICK, "hydra.run.dir=first", "seed=5")
    assert done.returncode == 0, done.stderr
    first = tmp_path / "first"
    left = {path.name for path in first.iterdir()}
    assert {".hydra", "metrics.jsonl", "summary.json", "report.html", "adapter"} <= left
    assert json.loads((first / "adapter" / "adapter_config.json").read_text())["use_dora"] is True
    summary = json.loads((first / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["seed"] == 5
    assert summary["settings"]["adapter"] == "dora"
    assert {"preference_accuracy", "chair_s", "recall", "yes_no_accuracy"} <= summary["before"].keys() & summary[
        "after"
    ].keys()
    assert {"steps", "seconds", "pairs_per_second", "memory_peak_gib", "first_loss", "last_loss"} <= summary[
        "train"
    ].keys()
    assert "┃ 4 held-out rows" in done.stdout
    assert "4 held-out rows: too few to tell." in done.stdout
    told = (
        "first: train model=tiny", "tuned/tiny (for model=tiny): learning_rate 0.001", "expected time: ", "importing",
        "device: CPU", "loading processor and rows", "loading the model", "evaluating 4 held-out rows before training",
        "training: 3 steps", "step 3/3  loss", "evaluating 4 held-out rows after training", "checking what was trained",
        "report: first/report.html\nnext:\n  python -m smolvlm_exp task=chat run=first ",
    )  # fmt: skip
    places = [done.stdout.find(line) for line in told]
    assert -1 not in places
    assert places == sorted(places)

    began = time.time()
    done = command("--config-path", "first/.hydra", "--config-name", "config", "hydra.run.dir=second")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "second") == losses(first)
    again = json.loads((tmp_path / "second" / "summary.json").read_text())
    seconds, took = again["seconds_by_phase"], (tmp_path / "second" / "summary.json").stat().st_mtime - began
    assert sum(seconds.values()) == pytest.approx(again["seconds"])
    assert again["seconds"] == pytest.approx(took, rel=0.02, abs=0.1)
    assert {"startup", "data", "model", "evaluation_before", "training", "evaluation_after", "saving"} < seconds.keys()
    assert re.search(rf"training steps +│ {seconds['training']:.1f} ", done.stdout)
    assert again["after"] == summary["after"]
    assert again["settings"] == summary["settings"]


def test_ctrl_c_saves_and_resume_goes_on_exactly(command, command_server, tmp_path):
    """Stopped by SIGINT at some step and resumed, the losses are those of a run that was left alone."""
    long = [
        *QUICK,
        "data.test_rows=2",
        "trainer.max_steps=10",
        "adapter.lora_dropout=0.1",
        "trainer.disable_dropout=false",
    ]
    assert command(*long, "hydra.run.dir=whole").returncode == 0
    folder = tmp_path / "outputs" / "a" / "b"
    with ThreadPoolExecutor() as pool:
        running = pool.submit(command, *long, f"hydra.run.dir={folder}", timeout=120)
        metrics = folder / "metrics.jsonl"
        while not running.done() and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.05)
        os.kill(command_server.child, signal.SIGINT)
        stopped = running.result()
    assert stopped.returncode == 75, stopped.stderr
    assert "resume=" in stopped.stderr
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    assert len(losses(folder)) < 10

    done = command("resume=last")
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(tmp_path / "whole")
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
    assert "resume" not in " ".join(yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text()))

    done = command("resume=last")  # whose work is done already: it would be measured again and its summary lost
    assert done.returncode == 2
    assert "outputs/a/b has finished" in done.stderr


def test_the_last_run_is_found_by_day_and_time_and_by_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("smolvlm_exp.runs.find.OUTPUTS", tmp_path)
    checkpoint, answers = "checkpoints/checkpoint-2", "answers.jsonl"
    newest_first = {
        f"evaluated/{answers}": "train",  # what a run answered in the end is nothing to go on from
        f"mined/{answers}": "mine",
        f"rounds/round-2/pairs/{answers}": "mine",
        f"more/rounds/round-1/{checkpoint}": "mine",  # the whole mining, not the training within it
        f"named/{checkpoint}": "train",
        f"2026-11-27/08-00-00/{checkpoint}": "train",
    }
    folders = []
    for age, (name, task) in enumerate(newest_first.items()):
        path = tmp_path / name
        path.mkdir(parents=True)
        os.utime(path, (1e9 - age, 1e9 - age))
        folder = tmp_path / re.sub(r"/(round-.*|checkpoints/.*|answers.*)", "", name)
        folders.append(folder)
        for run in {folder, *folder.glob("round-*")}:
            (run / ".hydra").mkdir()
            (run / ".hydra" / "config.yaml").write_text(f"task:\n  name: {task if run == folder else 'train'}\n")
    for folder in folders[1:]:
        assert find_run("last") == folder
        shutil.rmtree(folder)
    with pytest.raises(RequestError, match="has saved anything to resume from yet"):
        find_run("last")


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)


def test_wandb_offline_without_an_account(quick, tmp_path, no_account, monkeypatch, capsys):
    """Read back with W&B's own command: config, curves, summary, tables, artifacts, all inside the run folder."""
    monkeypatch.setattr("smolvlm_exp.tasks.tracking.choices", lambda folder: {"model": "tiny", "adapter": "dora"})
    monkeypatch.setattr("smolvlm_exp.tasks.tracking.overrides_of", lambda folder: ["adapter.r=2", "seed=3"])
    settings = ("tracker=wandb", "adapter.r=2", "trainer.sample_steps=2", "trainer.eval_strategy=steps", "seed=3")
    folder = tmp_path / "day" / "time"
    folder.mkdir(parents=True)
    summary = train(quick(*settings), folder)
    assert "W&B: offline" in capsys.readouterr().out
    (run,) = folder.glob("wandb/offline-run-*")
    inspect = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(run)]
    read = subprocess.run(inspect, capture_output=True, text=True, timeout=60).stdout
    records = [json.loads(line) for line in read.splitlines()]
    (told,) = (record["run"] for record in records if record["type"] == "run")
    assert told["display_name"] == "r=2 seed=3 day/time"
    assert told["run_group"] == told["config"]["update"]["without_seed"] == "r=2"
    assert told["tags"] == ["model=tiny", "adapter=dora"]
    config = told["config"]["update"]
    assert config.items() >= {
        "adapter": "dora", "adapter/r": 2, "trainer/max_steps": 3, "seed": 3, "sweep": None,
        "command": "python -m smolvlm_exp adapter.r=2 seed=3", "run_folder": str(folder),
        "versions/torch": summary["versions"]["torch"],
    }.items()  # fmt: skip
    unread = ("export", "session", "serve", "tracker", "task", "model/shape", "reward", "trainer/cache")
    assert not [key for key in config if key.startswith(unread)]

    end: dict = {}
    for record in records:
        end |= record["summary"]["update"] if record["type"] == "summary" else {}
    losses = [event["eval_loss"] for event in read_lines(folder / "metrics.jsonl") if "eval_loss" in event]
    assert end["eval/loss"] == pytest.approx({"min": min(losses), "last": losses[-1]})
    assert set(end["eval/rewards/margins"]) == {"max", "last"}
    for key in (
        "train/loss", "train/rewards/margins", "train/pairs_per_second", "before/preference_accuracy",
        "after/preference_accuracy", "after/preference_accuracy/low", "change/preference_accuracy/p",
        "seconds/training", *(f"checks/{check['id']}" for check in summary["checks"]),
    ):  # fmt: skip
        assert key in end
    assert (end["checks/passed"], end["checks_passed"]) == (True, True)

    made = {record["artifact"]["type"]: record["artifact"] for record in records if record["type"] == "artifact"}
    assert made["dataset"]["use_after_commit"]  # an input of this run; the others are its outputs
    paths = {Path(file["local_path"]) for artifact in made.values() for file in artifact["manifest"]["contents"]}
    assert {folder / "adapter" / "adapter_model.safetensors", folder / "report.html"} <= paths
    assert all(path.is_relative_to(folder) and path.is_file() for path in paths)  # images are in tables' artifacts

    assert list(run.glob("files/media/table/answers*.table.json"))
    (checks,) = (json.loads(path.read_text()) for path in run.glob("files/media/table/checks*.table.json"))
    assert [dict(zip(checks["columns"], row, strict=True)) for row in checks["data"]] == summary["checks"]
    shown = [json.loads(path.read_text()) for path in sorted(run.glob("files/media/table/samples*.table.json"))]
    assert len(shown) == 2  # before the first step, and after the second of three
    assert {len(table["data"]) for table in shown} == {4}


@pytest.mark.parametrize("data", ["photos", "files"])
def test_real_pictures_run_end_to_end(tmp_path, data):
    extra = []
    if data == "files":
        from PIL import Image

        folder = tmp_path / "mine"
        folder.mkdir()
        lines = []
        for i in range(10):
            Image.new("RGB", (90 + i, 60), (20 * i, 80, 200)).save(folder / f"{i}.png")
            lines.append(
                {
                    "image": f"{i}.png",
                    "question": "What is it?",
                    "chosen": f"It is picture {i}.",
                    "rejected": "It is a cat.",
                }
            )
        (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        extra = [f"data.folder={folder}", "data.test_fraction=0.3"]
    settings = [s for s in QUICK if not s.startswith("data.")]
    settings += [f"trainer.cache={tmp_path}", "trainer.per_device_train_batch_size=2"]
    summary = train(compose(f"data={data}", *extra, *settings), tmp_path)
    assert summary["status"] == "done"
    assert "chair_s" not in summary["before"]  # no truth is known, so none is claimed
    assert summary["data"]["train"]["rows"] >= 7


SMALL_COPY = [
    "model.shape.hidden_size=64",
    "model.shape.num_hidden_layers=1",
    "model.shape.intermediate_size=64",
    "model.shape.num_attention_heads=1",
    "model.shape.num_key_value_heads=1",
    "model.longest_edge=384",
    "model.shape.vision_hidden_size=64",
    "model.shape.vision_num_hidden_layers=1",
    "model.shape.vision_intermediate_size=64",
    "model.shape.vision_num_attention_heads=1",
]


def test_the_recipe_dry_runs_on_a_small_copy_of_its_shape(tmp_path, capsys):
    local = [
        "data=photos",
        "data.train=train",
        'data.test="test[:1]"',
        "trainer.sample_steps=0",
        "task.max_new_tokens=4",  # random weights never end an answer
        "data.num_proc=1",
        "tracker=none",
        f"trainer.cache={tmp_path}",
    ]
    short = [
        "trainer.max_steps=2",
        "trainer.gradient_accumulation_steps=2",
        "trainer.logging_steps=1",
        "trainer.eval_steps=1",
    ]
    summary = train(compose("experiment=cookbook", "model.weights=random", *SMALL_COPY, *local, *short), tmp_path)
    assert "in the vision tower (1 k_proj, 1 q_proj, 1 v_proj)" in capsys.readouterr().out
    assert summary["train"]["steps"] == 2


@pytest.mark.slow
def test_the_embedded_base_is_made_by_its_experiment(command, tmp_path):
    short = [
        "trainer.max_steps=3",
        "trainer.warmup_steps=1",
        "data.train_rows=64",
        "data.test_rows=8",
        "trainer.logging_steps=1",
        "trainer.per_device_train_batch_size=16",
        "trainer.dataloader_num_workers=0",
        "hydra.run.dir=run",
    ]
    done = command("experiment=tiny_base", *short)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run")[3] < losses(tmp_path / "run")[1]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_it_works_from_an_installed_wheel(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert not (site / "tests").exists()
    assert (site / "hydra_plugins" / "smolvlm_exp.py").is_file()
    env = {**os.environ, "PYTHONPATH": str(site)}
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "smolvlm_exp", "--cfg", "job", "experiment=cookbook"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout)["model"]["id"] == "HuggingFaceTB/SmolVLM-Instruct"
    where = (
        "import smolvlm_exp.utils.paths as c, smolvlm_exp.models.model as m;"
        "print(c.CONF); print(m.EMBEDDED.joinpath('model.safetensors').is_file())"
    )
    told = subprocess.run(
        [sys.executable, "-P", "-c", where], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert told.stdout.split() == [str(site / "smolvlm_exp" / "_conf"), "True"]


def test_a_command_is_composed_once_to_check_it_and_once_to_run_it(tmp_path, monkeypatch):
    composed, ran, compose_config = [], [], Hydra.compose_config

    def counted(*args, **kwargs):
        composed.append(kwargs["overrides"])
        return compose_config(*args, **kwargs)

    overrides = ["task=plan", "trainer.max_steps=7", f"hydra.run.dir={tmp_path}/run"]
    monkeypatch.setattr(Hydra, "compose_config", counted)
    monkeypatch.setattr(main, "execute", lambda config, folder: ran.append((config.trainer.max_steps, folder)))
    monkeypatch.setattr("sys.argv", ["smolvlm_exp", *overrides])
    main.main()
    assert composed == [overrides] * 2
    assert ran == [(7, tmp_path / "run")]


@pytest.mark.parametrize(("strict", "code"), [("true", 1), ("false", 0)])
def test_failed_checks_make_the_exit_code_1_where_that_is_asked_for(tmp_path, monkeypatch, capsys, strict, code):
    checks = [{"id": "leaked_rows", "verdict": "fail"}, {"id": "length_change", "verdict": "warn"}]
    summary = {"status": "done", "checks": checks, "checks_passed": False, "after": {"preference_accuracy": 1.0}}
    monkeypatch.setattr(main, "execute", lambda config, folder: summary)
    monkeypatch.setattr("sys.argv", ["smolvlm_exp", f"strict_checks={strict}", f"hydra.run.dir={tmp_path}/run"])
    with pytest.raises(SystemExit) if code else nullcontext() as ended:
        main.main()
    assert not code or ended.value.code == code
    assert ("strict_checks=true: leaked_rows failed." in capsys.readouterr().err) == bool(code)


def test_a_missing_package_is_one_line(tmp_path):
    """As with the system's Python after `make run`, which has installed into .venv."""
    typed = [sys.executable, "-S", "-m", "smolvlm_exp"]  # -S: without site-packages
    done = subprocess.run(typed, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("smolvlm_exp: hydra is not installed for ")
    assert ". .venv/bin/activate" in done.stderr
    assert len(done.stderr.splitlines()) == 1
