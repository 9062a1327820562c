"""The doctor's verdicts on a working machine and on every fault that can be provoked."""

import re
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import wandb
from bitsandbytes.nn import Linear4bit
from huggingface_hub import constants
from packaging.requirements import Requirement
from wandb.sdk import wandb_setup

from smolvlm_exp.tasks import doctor as module
from smolvlm_exp.tasks.doctor import Finding, attempt, check_machine, line
from tests.conftest import compose

KEY = "0123456789abcdef" * 3


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No network, no account, no colour, whatever the machine that runs the tests has."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb_setup, "singleton", lambda: SimpleNamespace(settings=wandb.Settings()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(module, "HF_HOME", tmp_path / "cache")


def findings(rows: list[str]) -> dict[str, tuple[str, str]]:
    """Printed lines: name -> (verdict, the rest of its line)."""
    found = [re.fullmatch(r"(ok|warn|fail) +(\S+) +(.*)", row) for row in rows]
    assert all(found), rows
    return {m[2]: (m[1], m[3]) for m in found if m}


def printed(capsys) -> dict[str, tuple[str, str]]:
    return findings(capsys.readouterr().out.split("\n\n")[0].splitlines())


def test_a_working_machine_can_run_the_main_job(capsys, tmp_path):
    start = time.perf_counter()
    assert check_machine(tmp_path / "outputs" / "new") == 0
    assert time.perf_counter() - start < 15
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    seen = findings(rows)
    assert list(seen) == [
        *("python", "packages", "imports", "matmul", "cuda", "bf16", "nf4"),
        *("flash-attn", "images", "memory", "disk", "cache", "hub", "w&b"),
    ]
    assert not [name for name, (verdict, _) in seen.items() if verdict == "fail"]
    assert all((" -> " in rest) == (verdict != "ok") for verdict, rest in seen.values())
    assert not list(tmp_path.iterdir())
    start_of_detail = 8 + max(map(len, seen))
    assert {row[start_of_detail - 2 : start_of_detail] for row in rows} == {"  "}
    assert all(row[start_of_detail] != " " for row in rows)


def test_it_ends_with_commands_that_suit_this_machine(monkeypatch, capsys, tmp_path):
    assert check_machine(tmp_path) == 0
    end = capsys.readouterr().out.rpartition("on this machine:\n")[2].splitlines()
    assert end[0] == "  python -m smolvlm_exp"
    for typed in end:  # each composes
        words = typed.split()[3:]
        compose(*(word for word in words if word != "-m"), multirun="-m" in words)

    gpu = {"is_available": lambda: True, "device_count": lambda: 2, "mem_get_info": lambda: (free << 30, 80 << 30)}
    for name, function in gpu.items():
        monkeypatch.setattr(torch.cuda, name, function)
    for free, model in ((3, "smolvlm_256m"), (6, "smolvlm_500m"), (70, "smolvlm")):
        commands = module.fitting_commands()
        assert commands[1] == f"task=plan model={model} trainer.memory_budget={free}GiB"
        assert commands[2].startswith(f"model={model} data=files")
        assert commands[3].startswith("-m hydra/launcher=parallel")


def test_only_a_terminal_gets_colour():
    finding = Finding("disk", "fail", "full\nof   things", "make room")
    assert line(finding, 6, colour=False) == "fail  disk    full of things  -> make room"
    assert line(finding, 6, colour=True).startswith("\033[31mfail\033[0m  disk")


def test_torch_is_imported_late():
    code = "import sys, smolvlm_exp.tasks.doctor; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# 4 bit


def test_nf4_is_measured_against_float():
    finding = module.check_nf4()
    errors = [float(e) for e in re.findall(r"(?:eval|train|gradient) ([\d.]+)", finding.detail)]
    assert finding.verdict == "ok"
    assert len(errors) == 3
    assert all(0.08 < error < 0.1 for error in errors)


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_a_wrong_4_bit_answer_fails(factor, monkeypatch):
    monkeypatch.setattr(Linear4bit, "forward", lambda layer, x: x * factor)
    finding = module.check_nf4()
    assert (finding.verdict, finding.fix) == ("fail", "reinstall bitsandbytes, or run without 4 bit: quant=none")


def test_fp4_in_place_of_nf4_fails(monkeypatch):
    init = Linear4bit.__init__
    monkeypatch.setattr(Linear4bit, "__init__", lambda self, *a, **k: init(self, *a, **{**k, "quant_type": "fp4"}))
    assert module.check_nf4().verdict == "fail"


def test_a_weight_repacked_in_eval_is_not_used(monkeypatch):
    """On CPUs with AVX512-BF16 the first eval forward repacks the weight unless the layer forbids it."""
    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", lambda *a: pytest.fail("repacked"))
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert module.check_nf4().verdict == "ok"


# Faults


def test_every_check_may_raise(monkeypatch, capsys, tmp_path):
    """A line per check, and no traceback."""

    def broken(*_):
        raise ImportError("libsomething.so:\nno such file")

    for name in [n for n in vars(module) if n.startswith("check_")]:
        monkeypatch.setattr(module, name, broken)
    assert check_machine(tmp_path) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "cannot run here. Fix first: python, imports, matmul, cuda, bf16, nf4, images, disk." in out
    seen = findings(out.split("\n\n")[0].splitlines())
    assert len(seen) == 14
    assert all("ImportError: libsomething.so: no such file  -> " in rest for _, rest in seen.values())
    may_be_missing = ["packages", "flash-attn", "memory", "cache", "hub", "w&b"]
    assert [name for name, (verdict, _) in seen.items() if verdict == "warn"] == may_be_missing


def test_ctrl_c_still_stops():
    def interrupt() -> Finding:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt("x", interrupt, "fail", "")


def test_a_folder_that_cannot_be_written_fails(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert check_machine(tmp_path / "file" / "outputs") == 1
    verdict, rest = printed(capsys)["disk"]
    assert verdict == "fail"
    assert rest.endswith("-> write elsewhere: hydra.run.dir=FOLDER")


def test_little_room_warns(monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 30))
    finding = module.check_folder("disk", tmp_path)
    assert (finding.verdict, finding.detail.split()[0]) == ("warn", "3.0")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    assert module.check_memory().verdict == "warn"


# Versions


@pytest.mark.parametrize(
    ("needs", "verdict", "detail"),
    [
        (["torch>=99"], "fail", r"torch \S+ is outside >=99"),
        (["torch<1"], "warn", r"torch \S+ is outside <1"),
        (["nobody-has-this>=1"], "fail", "no nobody-has-this"),
        (["torch>=99", "pillow<1"], "fail", r"torch \S+ is outside >=99; pillow \S+ is outside <1"),
    ],
    ids=str,
)
def test_every_version_outside_its_bounds_is_named_with_one_fix_for_all(needs, verdict, detail, monkeypatch):
    monkeypatch.setattr(module, "requirements", lambda: [Requirement(need) for need in ("tqdm>=1", *needs)])
    finding = module.check_packages()
    assert finding.verdict == verdict
    assert re.fullmatch(detail, finding.detail)
    assert finding.fix == "pip install " + " ".join(f"'{need}'" for need in needs)


def test_bounds_come_from_the_installed_package_without_its_extras(monkeypatch):
    stated = ["torch<3,>=2", "pytest>=9; extra == 'test'", "tomli; python_version < '3'"]
    monkeypatch.setattr(metadata, "requires", lambda _: stated)
    assert [r.name for r in module.requirements()] == ["torch"]


def test_a_plain_checkout_is_said(monkeypatch, capsys, tmp_path):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert check_machine(tmp_path) == 0
    verdict, rest = printed(capsys)["packages"]
    assert verdict == "warn"
    assert "smolvlm-exp" in rest
    assert "pip install -e ." in rest


def test_python_bound_is_the_projects(monkeypatch):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + ".".join(map(str, module.PYTHON))
    monkeypatch.setattr(module, "PYTHON", (4, 0))
    finding = module.check_python()
    assert (finding.verdict, finding.fix) == ("fail", "make a virtual environment with Python 4.0 or newer")


# The card, without one


def test_a_gpu_that_torch_does_not_see_warns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert module.check_cuda().fix == "install a torch built for CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert module.check_cuda().verdict == "warn"
    assert "driver" in module.check_cuda().fix


@pytest.mark.parametrize(("free", "verdict"), [(20, "ok"), (1, "warn")])
def test_a_card_is_described(free, verdict, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free << 30, 24 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    finding = module.check_cuda()
    assert finding.verdict == verdict
    assert finding.detail == f"Some Card (1 of 2), capability 8.9, {free}.0 of 24.0 GiB free"


@pytest.mark.gpu
def test_a_real_card_passes():
    for check in (module.check_cuda, module.check_nf4, module.check_flash_attention):
        assert check().verdict == "ok"
    assert "on cuda" in module.check_nf4().detail
    for name, dtype in (("matmul", "float32"), ("bf16", "bfloat16")):
        assert f"{dtype} on cuda" in module.check_matmul(name, dtype).detail


# The network and the account


def client(answer):
    return lambda: SimpleNamespace(head=lambda *a, **k: answer())


@pytest.mark.parametrize(("status", "verdict"), [(200, "ok"), (503, "warn")])
def test_the_hub_is_asked(status, verdict, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_session", client(lambda: SimpleNamespace(status_code=status)))
    finding = module.check_hub()
    assert finding.verdict == verdict
    assert f"HTTP {status}" in finding.detail


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(module, "HUB_SECONDS", 0.1)
    monkeypatch.setattr("huggingface_hub.get_session", client(lambda: time.sleep(5)))
    start = time.perf_counter()
    finding = module.check_hub()
    assert time.perf_counter() - start < 2
    assert (finding.verdict, "embedded default" in finding.fix) == ("warn", True)


def test_offline_by_choice_is_said_and_the_cache_counted(monkeypatch, tmp_path):
    (tmp_path / "models--a--b").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    finding = module.check_hub()
    assert (finding.verdict, finding.detail) == ("warn", "OfflineModeIsEnabled; 1 models in the cache")


@pytest.mark.parametrize(
    ("environment", "verdict", "detail"),
    [
        ({}, "warn", "offline: no account"),
        ({"WANDB_API_KEY": "short-secret"}, "warn", "offline: the key has the wrong form"),
        ({"WANDB_API_KEY": KEY}, "ok", "online: logged in"),
        ({"WANDB_MODE": "offline"}, "ok", "offline, as you chose"),
    ],
)
def test_the_account_is_described_without_its_key(environment, verdict, detail, monkeypatch, capfd):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = module.check_wandb()
    assert (finding.verdict, finding.detail) == (verdict, detail)
    assert ("`wandb login`" in finding.fix) == (verdict == "warn")
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("netrc", "verdict"),
    [
        (f"machine api.wandb.ai\n  login user\n  password {KEY}\n", "ok"),
        (f"machine api.wandb.ai\n  {KEY} user\n", "warn"),
        (f"machine api.wandb.ai password {KEY[:20]}", "warn"),
    ],
    ids=["login", "malformed", "short"],
)
def test_a_key_in_netrc_is_never_printed(netrc, verdict, capfd, tmp_path):
    (tmp_path / "netrc").write_text(netrc)
    finding = module.check_wandb()
    assert finding.verdict == verdict
    assert KEY[:20] not in str(finding) + "".join(capfd.readouterr())
