"""trainer=grpo as a run: rows without pairs, what it leaves behind, what it refuses."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from smolvlm_exp.tasks import train as task
from smolvlm_exp.tasks.train import train
from smolvlm_exp.training import grpo
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import QUICK, compose, read_lines

CODE = "def longer(completion_ids, **columns):\n    return [float(len(set(ids))) for ids in completion_ids]\n"
GRPO = (
    "trainer=grpo", "adapter=lora", "adapter.r=2", "quant=none", "trainer.num_generations=4",
    "trainer.gradient_accumulation_steps=2", "trainer.max_completion_length=6", "trainer.learning_rate=5e-3",
    "trainer.mask_truncated_completions=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows that say what is true of their image, and have no pair of answers."""
    folder = tmp_path_factory.mktemp("files")
    lines = []
    for i in range(12):
        Image.new("RGB", (64, 64), (20 * i, 80, 200)).save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": "Is it blue?", "answer": "yes"})
    for name, part in (("train", lines[:8]), ("test", lines[8:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    return folder


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def settings(files, user, tmp_path):
    quick = [override for override in QUICK if not override.startswith("data.")]
    own = (
        "data=files", f"data.folder={files}", f"reward.user={user}:longer", "reward.user_weight=0.1",
        "trainer.save_strategy=steps", "trainer.save_steps=2", f"trainer.cache={tmp_path}/cache",
    )  # fmt: skip

    def composed(*overrides):
        return compose(*quick, *GRPO, *own, *overrides)

    return composed


def test_a_run_on_rows_without_pairs(settings, user, tmp_path, monkeypatch, capsys):
    """It ends with checks, a report, a table at W&B, the hash of its reward's file, and is not resumed with another."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    env = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    folder, sha256 = tmp_path / "run", hashlib.sha256(CODE.encode()).hexdigest()
    folder.mkdir()
    summary = train(settings("tracker=wandb"), folder)
    assert capsys.readouterr().out.count("a loss of about 0 is normal") == 1
    checks = {check["id"]: check for check in summary["checks"]}
    assert (checks["adapter_reload"]["value"], checks["adapter_reload"]["verdict"]) == (0, "ok")
    assert "answers_changed" in checks
    assert "policy_changed" not in checks
    assert "reward_image_contribution" in checks
    assert summary["reward_code"] == json.loads((folder / "summary.json").read_text())["reward_code"]
    assert summary["reward_code"] == {"longer": sha256}
    saved = json.loads((folder / "checkpoints" / "checkpoint-2" / "run.json").read_text())
    assert saved["reward.code.longer"] == sha256

    report = (folder / "report.html").read_text()
    assert "Answers that the model was trained on" in report
    assert report.count("<h3>Step ") == 3
    best = max(read_lines(folder / "completions.jsonl")[0]["answers"], key=lambda answer: answer["reward"])
    assert f"longer {best['rewards']['longer']:g}" in report

    (run,) = folder.glob("wandb/offline-run-*")
    (told,) = (json.loads(path.read_text()) for path in run.glob("files/media/table/completions*.table.json"))
    assert told["columns"][:4] == ["step", "question", "answer", "reward"]
    assert {"reward/longer", "reward/yes_no"} <= {*told["columns"]}
    assert [row[0] for row in told["data"]] == [1] * 4 + [2] * 4 + [3] * 4
    inspect = [str(os.path.join(os.path.dirname(sys.executable), "wandb")), "leet", "inspect", "--json", str(run)]
    read = subprocess.run(inspect, capture_output=True, text=True, timeout=60, env={**os.environ, **env}).stdout
    for key in (
        "reward", "frac_reward_zero_std", "completions/mean_length", "clip_ratio/region_mean", "entropy",
        "rewards/longer/mean",
    ):  # fmt: skip
        assert f'"train/{key}"' in read

    monkeypatch.setattr(task, "load_trainable_model", lambda *a: pytest.fail("the model was loaded"))
    for change, said in (
        (("reward.user_weight=0.2",), r"reward\.user_weight was 0\.1 and is 0\.2"),
        (("trainer.temperature=0.9",), r"trainer\.temperature was 1\.0 and is 0\.9"),
    ):
        with pytest.raises(RequestError, match=said):
            train(settings(f"resume={folder}", *change), folder)
    user.write_text(CODE.replace("set(ids)", "ids"))
    try:
        with pytest.raises(RequestError, match=r"the file with the reward longer is not the one that the run began w"):
            train(settings(f"resume={folder}"), folder)
    finally:
        user.write_text(CODE)


def test_a_row_without_a_picture_is_named(settings, files, tmp_path):
    rows = files / "train.jsonl"
    whole = rows.read_text()
    lines = whole.splitlines()
    lines[3] = json.dumps({"question": "Is it blue?", "answer": "yes"})
    rows.write_text("\n".join(lines))
    try:
        with pytest.raises(RequestError, match=r"train row 3 \(.*train\.jsonl.*\): it has no image"):
            train(settings(), tmp_path)
    finally:
        rows.write_text(whole)


@pytest.mark.parametrize("engine", ["shared", "stock"])
def test_fewer_rows_than_a_step_takes_are_refused(settings, tmp_path, engine):
    many = f"trainer.engine={engine}", "trainer.per_device_train_batch_size=16", "trainer.gradient_accumulation_steps=4"
    with pytest.raises(RequestError, match=r"data\.train has 8 rows, and answers to 16 are sampled at a time"):
        train(settings(*many), tmp_path)


def build(config, folder):
    return grpo.build_arguments(config.trainer, folder, "float32", None, 0)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_are_refused(quick, tmp_path, monkeypatch, name):
    arguments = grpo_config(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(RequestError, match="samples answers from whole weights, and FSDP or DeepSpeed shards them"):
        grpo.check_arguments(quick(*GRPO).trainer, arguments)
    grpo.check_arguments(quick(*GRPO, "trainer.engine=stock").trainer, arguments)


def grpo_config(folder):
    from trl import GRPOConfig

    return GRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, num_generations=4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("+trainer.extra.use_adaptive_entropy=true",),
            r"trainer\.extra\.use_adaptive_entropy needs trainer\.engine=st",
        ),
        (("+trainer.extra.repetition_penalty=1.2",), r"trainer\.extra\.repetition_penalty needs trainer\.engine=stock"),
        (("trainer.per_device_train_batch_size=3", "trainer.gradient_accumulation_steps=1"), "3|divisible"),
    ],
)
def test_what_the_engine_cannot_sample_is_refused(quick, tmp_path, overrides, said):
    with pytest.raises(RequestError, match=said):
        build(quick(*GRPO, *overrides), tmp_path)
