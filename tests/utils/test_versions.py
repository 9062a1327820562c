"""Packages that are incompatible are named before any work, and constraints.txt is complete."""

import os
import re
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement

from smolvlm_exp.deploy.session.backends import load_folder
from smolvlm_exp.tasks.doctor import attempt, check_imports
from smolvlm_exp.utils import versions
from smolvlm_exp.utils.paths import PACKAGE
from smolvlm_exp.utils.versions import check_torchvision, code_commit


@pytest.fixture
def torchvision(tmp_path):
    """A folder with a torchvision built for another torch, as the registry's is for torch on a CPU."""
    for name in ("torchvision", "torchvision-0.25.0.dist-info"):
        (tmp_path / "site" / name).mkdir(parents=True)
    broken = 'raise RuntimeError("operator torchvision::nms does not exist")'
    (tmp_path / "site" / "torchvision" / "__init__.py").write_text(broken)
    metadata = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.25.0\n"
    (tmp_path / "site" / "torchvision-0.25.0.dist-info" / "METADATA").write_text(metadata)
    return str(tmp_path / "site")


def test_a_command_names_a_torchvision_for_another_torch(torchvision, command):
    """transformers would say "Could not import module 'AutoProcessor'", and not what to do."""
    path = os.pathsep.join([torchvision, str(PACKAGE.parent)])
    done = command("task=chat", env={"PYTHONPATH": path}, fresh=True)
    assert done.returncode == 2
    assert "torchvision 0.25.0 is incompatible with torch" in done.stderr
    assert "nms does not exist): pip uninstall torchvision; Pillow is enough" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_doctor_names_it_too(torchvision, monkeypatch):
    monkeypatch.syspath_prepend(torchvision)
    finding = attempt("imports", check_imports, "fail", "")
    assert finding.verdict == "fail"
    assert "torchvision 0.25.0 is incompatible with torch" in finding.detail


def test_images_are_processed_by_pillow_with_or_without_torchvision(processor, small):
    """The same pixels on every machine: torchvision's resampling differs."""
    check_torchvision()
    for each in (processor, load_folder(small, None)[1]):
        assert type(each.image_processor).__name__ == "Idefics3ImageProcessorPil"


def test_constraints_are_exact_and_cover_what_pyproject_asks_for():
    """No host, path or local build tag, and every requirement pinned."""
    lines = (PACKAGE.parent / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[0-9a-z.]+", version) for version in pins.values())
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = (need for extra in ("search", "export", "serve") for need in extras[extra])
    wanted = [*project["dependencies"], *extras["test"][1:], *optional]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_the_commit_of_the_code_and_whether_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "HOME", str(tmp_path))
    assert code_commit() == (None, False)  # installed, not a checkout
    author = ("-c", "user.name=A", "-c", "user.email=a@b.c")

    def git(*arguments):
        done = subprocess.run(["git", "-C", tmp_path, *author, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    file = tmp_path / "file"
    file.write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert code_commit() == (commit, False)
    file.write_text("2")
    assert code_commit() == (commit, True)
