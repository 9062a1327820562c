"""Packages that do not go together: said by name, before any work, and not as a fault of something else."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from smolvlm_exp.utils.paths import PACKAGE
from smolvlm_exp.utils.versions import check_torchvision


@pytest.fixture
def torchvision(tmp_path):
    """The environment of a command that finds a torchvision built for another torch, as the registry's is on a CPU."""
    places = tmp_path / "places"
    for folder in (places / "torchvision", places / "torchvision-0.25.0.dist-info"):
        folder.mkdir(parents=True)
    broken = 'raise RuntimeError("operator torchvision::nms does not exist")'
    (places / "torchvision" / "__init__.py").write_text(broken)
    metadata = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.25.0\n"
    (places / "torchvision-0.25.0.dist-info" / "METADATA").write_text(metadata)
    return {"PYTHONPATH": os.pathsep.join([str(places), str(PACKAGE.parent)])}


def test_a_torchvision_for_another_torch_is_named(torchvision, command, tmp_path):
    """transformers tells of it as "Could not import module 'AutoProcessor'", and of nothing to be done."""
    done = command("task=chat", env=torchvision, fresh=True)
    assert done.returncode == 2
    assert "torchvision 0.25.0 does not go with torch" in done.stderr
    assert "nms does not exist): pip uninstall torchvision; Pillow is enough" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_doctor_names_it_too(torchvision):
    code = "from smolvlm_exp.tasks.doctor import *; print(attempt('imports', check_imports, 'fail', ''))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **torchvision}, capture_output=True, text=True, check=True
    )
    assert "verdict='fail'" in done.stdout
    assert "torchvision 0.25.0 does not go with torch" in done.stdout


def test_pillow_serves_with_torchvision_and_without(processor, small):
    """The same pixels on every machine: torchvision's resampling differs, and an installed one is not to be taken."""
    from smolvlm_exp.deploy.session.backends import load_folder

    check_torchvision()
    for each in (processor, load_folder(small, None)[1]):
        assert type(each.image_processor).__name__ == "Idefics3ImageProcessorPil"


def test_constraints_are_exact_and_cover_what_pyproject_asks_for():
    """On any machine: no host, path or local build tag in it, and no requirement that it leaves to the day."""
    lines = (PACKAGE.parent / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[0-9a-z.]+", version) for version in pins.values())
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *extras["test"][1:],
        *(r for e in ("search", "export", "serve") for r in extras[e]),
    ]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
