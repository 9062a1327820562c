"""P12: nothing that comes along runs, and nothing outside is reached."""

import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from omegaconf import OmegaConf
from peft import LoraConfig
from safetensors.torch import load_file

from smolvlm_exp import main
from smolvlm_exp.config.previous_run import complete_overrides
from smolvlm_exp.data.images import ImageError, ImageLimits, prepare_image
from smolvlm_exp.data.loading import load_saved
from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.data.sources.hub import find
from smolvlm_exp.deploy.options import PARTS
from smolvlm_exp.deploy.session.backends import load_folder
from smolvlm_exp.models.adapter import AdapterConfig, saved_adapter
from smolvlm_exp.models.model import EMBEDDED, load_model, load_processor
from smolvlm_exp.runs.checkpoint import MANIFEST, checkpoints, damage, newest_intact
from smolvlm_exp.utils.errors import RequestError, RunError
from smolvlm_exp.utils.files import sha256
from tests.conftest import compose
from tests.reliability.conftest import typed
from tests.reliability.test_bad_rows import GOOD, PATHS, config, encoded, write
from tests.reliability.test_checkpoints import TWO


class Payload:
    """What a pickle runs when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path):
    """A file that is there once a payload ran."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "a payload ran"


def test_the_payload_is_one(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "training_args.bin", "pytorch_model.bin", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_not_read(spare, built, marker, tmp_path, name):
    """Even where whoever put it there made the manifest fit."""
    run = Path(shutil.copytree(built, tmp_path / "run"))
    (checkpoint,) = checkpoints(run)[-1:]
    torch.save({"state": Payload(marker)}, checkpoint / name)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = [(checkpoint / name).stat().st_size, sha256(checkpoint / name)]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert newest_intact(run) == checkpoint
    with pytest.raises(RunError, match="pickles are never read"):
        spare.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("linked", [False, True])
def test_a_checkpoint_brings_no_further_adapter(spare, built, tmp_path, linked):
    """Upstream would add one, and PEFT import what a field of it names."""
    run = Path(shutil.copytree(built, tmp_path / "run"))
    (checkpoint,) = checkpoints(run)[-1:]
    folder = tmp_path / "evil" if linked else checkpoint / "evil"
    strange = LoraConfig(r=2, target_modules="all-linear", megatron_config={"a": 1}, megatron_core="this")
    strange.save_pretrained(folder)
    shutil.copy(checkpoint / "adapter_model.safetensors", folder)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    if linked:
        (checkpoint / "evil").symlink_to(folder)
    else:
        manifest["files"] |= {f"evil/{file.name}": [file.stat().st_size, sha256(file)] for file in folder.iterdir()}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert damage(checkpoint) == ("evil is not in its manifest.json" if linked else "")
    with pytest.raises(RunError, match="holds evil/, which is no adapter of this model"):
        spare.train(resume_from_checkpoint=str(checkpoint))
    assert "this" not in sys.modules


@pytest.fixture(scope="module")
def spare(bench, tmp_path_factory):
    """A trainer that never gets to train."""
    return bench.trainer(tmp_path_factory.mktemp("spare"), *TWO)


@pytest.mark.parametrize(
    "override",
    [
        "+trainer.extra._target_=os.system",
        "+model.extra.trust_remote_code=true",
        "+model.extra.attn_implementation=kernels-community/flash-attn",
        "+model.extra.use_kernels=true",
        "+hydra.callbacks.evil._target_=os.system",
        "hydra.launcher._target_=os.system",
        "+hydra.job.env_set.LD_PRELOAD=evil.so",
        "+hydra.job.env_set={LD_PRELOAD: evil.so}",
        "+hydra.callbacks={evil: {_target_: os.system}}",
        "+hydra.callbacks.evil={_target_: hydra._internal.utils.os.system}",
        "hydra.launcher={_target_: os.system}",
        "hydra.sweeper={_target_: hydra_plugins.smolvlm_exp.sys.exit}",
        "hydra.searchpath=[pkg://evil]",
        "+hydra.job_logging.handlers={evil: {class: subprocess.Popen, args: [touch, ran]}}",
        "+hydra.job_logging.handlers={evil: {class: logging.os.system, command: touch ran}}",
        "+hydra.job_logging.handlers={evil: {class: logging.StreamHandler, stream: 'ext://evil.module'}}",
        "+hydra.job_logging.handlers={evil: {class: logging.StreamHandler, stream: '${name}://evil.module'}}",
        "+trainer.extra.model_init_kwargs={trust_remote_code: true}",
        "+trainer.extra={dataset_kwargs: {trust_remote_code: true}}",
        "++data.trust_remote_code=true",
        "+trust_remote_code=true",
        "+model.extra.code_revision=main",
        "+adapter.extra._target_=os.system",
        "+quant.extra.trust_remote_code=true",
        "+adapter.extra.megatron_config={a: 1}",
    ],
)
def test_no_setting_makes_code_run(override):
    with pytest.raises(RequestError, match=r"would run code"):
        typed(override)


@pytest.mark.parametrize("group", ["hydra", "trainer", "evil", "logging", "factory", "elsewhere", "package"])
def test_no_config_file_makes_code_run(group, marker, tmp_path):
    """A folder as a run leaves it, that somebody else wrote: --config-path FOLDER."""
    call = f"{{_target_: os.system, _args_: ['touch {marker}']}}"
    lines = {
        "hydra": f"hydra: {{callbacks: {{evil: {call}}}}}",
        "trainer": f"trainer: {{extra: {call}}}",
        "evil": f"evil: {call}",
        "logging": f"hydra: {{job_logging: {{handlers: {{a: {{class: subprocess.Popen, args: [touch, {marker}]}}}}}}}}",
        "factory": f"hydra: {{job_logging: {{handlers: {{a: {{(): os.system, command: 'touch {marker}'}}}}}}}}",
        "elsewhere": "hydra: {job: {env_set: '${trainer.extra}'}}",
        "package": "hydra: {searchpath: [pkg://evil]}",
    }[group]
    whole = OmegaConf.merge(asdict(compose()), OmegaConf.create(lines))
    (tmp_path / "config.yaml").write_text(f"defaults: [_self_]\n{OmegaConf.to_yaml(whole)}")
    with pytest.raises(RequestError, match=r"would run code|evil: no such setting"):
        typed(config_path=str(tmp_path), config_name="config")


KEYS = {
    "reward.user": "evil.py:reward",
    "reward.judge.url": "http://evil.example/v1",
    "reward.judge.key_variable": "HF_TOKEN",
}


@pytest.mark.parametrize(
    ("place", "key"),
    [*((place, "reward.user") for place in ("experiment", "reward", "sweep", "interpolation", "replay")),
     ("experiment", "reward.judge.url"), ("replay", "reward.judge.key_variable")],
)  # fmt: skip
def test_a_file_names_no_code_and_no_address(place, key, tmp_path):
    """Only what is typed counts; the same value, typed again, does."""
    value = KEYS[key]
    whole = OmegaConf.create(asdict(compose()))
    OmegaConf.update(whole, key, value)
    file, text = {
        "experiment": ("experiment/own.yaml", OmegaConf.to_yaml({"reward": whole.reward})),
        "reward": ("reward/own.yaml", OmegaConf.to_yaml(whole.reward)),
        "sweep": ("experiment/own.yaml", f"hydra: {{sweeper: {{params: {{{key}: '{value}'}}}}}}\n"),
        "interpolation": ("experiment/own.yaml", f"name: '{value}'\n"),
        "replay": ("config.yaml", f"defaults: [_self_]\n{OmegaConf.to_yaml(whole)}"),
    }[place]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# @package _global_\n{text}" if path.parent.name == "experiment" else text)
    chosen = [] if place == "replay" else [f"{path.parent.name}=own"]
    options = {"config_path" if place == "replay" else "config_dir": str(tmp_path), "multirun": place == "sweep"}
    indirect = [f"{key}=${{name}}"] if place == "interpolation" else []
    with pytest.raises(RequestError, match=rf"type {key}={value}"):
        typed(*chosen, *indirect, **options)
    (config, *_) = typed(*chosen, f"{key}={value}", **options)
    assert OmegaConf.select(OmegaConf.create(asdict(config)), key) == value


@pytest.mark.parametrize(("key", "task"), [("export.push_to_hub", "export"), ("task.push_to_hub", "mine")])
def test_a_file_names_no_repository_to_upload_to(key, task, tmp_path):
    """It could be one of the person's own, which would then hold a stranger's model."""
    group, _, name = key.partition(".")
    (tmp_path / "experiment").mkdir()
    own = f"# @package _global_\n{group}: {{{name}: you/best}}\n"
    (tmp_path / "experiment" / "own.yaml").write_text(own)
    with pytest.raises(RequestError, match=rf"type {key}=you/best"):
        typed(f"task={task}", "experiment=own", config_dir=str(tmp_path))
    typed(f"task={task}", "experiment=own", f"{key}=you/best", config_dir=str(tmp_path))
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "adapter").mkdir()
    source = {"hydra": {"runtime": {"choices": {}, "config_sources": []}}}
    for file, content in (("overrides", [f"{key}=you/best"]), ("hydra", source), ("config", {})):
        (tmp_path / ".hydra" / f"{file}.yaml").write_text(json.dumps(content))
    command = [f"task={task}", f"run={tmp_path}"]
    if task == "export":
        with pytest.raises(RequestError, match=rf"type {key}=you/best"):
            complete_overrides(command, multirun=False)
    else:  # no run's `task.*` is taken
        assert key not in " ".join(complete_overrides(command, multirun=False))


def test_a_model_folder_brings_no_code(marker, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    (folder / "evil.py").write_text(f"import os\nos.system('touch {marker}')\nclass Evil: pass\n")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        path = folder / name
        told = json.loads(path.read_text()) if path.exists() else {}
        kinds = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer")
        path.write_text(json.dumps({**told, "auto_map": dict.fromkeys(kinds, "evil.Evil")}))
    model = compose(f"model.id={folder}").model
    for load in (load_model, load_processor):
        try:
            load(model)
        except RequestError as error:
            print(error)
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    with pytest.raises(RequestError, match=r"model\.id="):
        load_model(model)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_an_export_brings_no_code(marker, tmp_path, small, kind):
    """What chat and serve open: neither Python files nor pickles beside or in place of the weights."""
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    (folder / "evil.py").write_text(f"import os\nos.system('touch {marker}')\nclass Evil: pass\n")
    (folder / "export.json").write_text(json.dumps({"precisions": {}}))
    told = json.loads((folder / "config.json").read_text())
    told |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(told))
    if kind == "onnx":
        (folder / "onnx").mkdir()
        for part in PARTS:
            (folder / "onnx" / f"{part}.onnx").write_bytes(b"")
    with pytest.raises(RequestError, match=r"model\.id="):
        load_folder(folder, "fp32" if kind == "onnx" else None)
    if kind == "torch":
        shutil.copy(small / "config.json", folder / "config.json")
        (folder / "model.safetensors").unlink()
        torch.save({"weight": Payload(marker)}, folder / "pytorch_model.bin")
        with pytest.raises(RequestError, match=r"model\.id="):
            load_folder(folder, None)


def test_no_kernels_come_from_the_hub(marker, tmp_path):
    """bitsandbytes asks `kernels`, where it is installed, for code from the Hub as soon as it is imported."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    package = tmp_path / "installed" / "kernels"
    told = package.with_name(f"kernels-{KERNELS_MIN_VERSION}.dist-info")
    for folder in (package, told):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(marker)!r}, 'w')\n__getattr__ = lambda name: None\n")
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = "import smolvlm_exp, bitsandbytes, peft, transformers.integrations.hub_kernels"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_hydra_reads_no_pickle(marker, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Payload(marker)))
    monkeypatch.setattr("sys.argv", ["smolvlm_exp", "--experimental-rerun", str(tmp_path / "config.pickle")])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert "--experimental-rerun reads a pickle" in capsys.readouterr().err


def test_what_is_hydras_own_runs():
    for override in ("hydra/launcher=parallel", "hydra/sweeper=search", "hydra/job_logging=default"):
        typed(override)
    typed("+hydra.job_logging.handlers={a: {class: logging.FileHandler, filename: a.log}}")


def test_weights_that_are_a_pickle_are_refused(marker, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"weight": Payload(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(RequestError, match=r"model\.id="):
        load_model(compose(f"model.id={folder}").model)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    torch.save({"weight": Payload(marker)}, adapter / "adapter_model.bin")
    with pytest.raises(RequestError, match=r"no adapter_model\.safetensors"):
        saved_adapter(AdapterConfig(), str(adapter), "embedded")


STRANGE = {
    "megatron_config": ({"megatron_config": {"a": 1}, "megatron_core": "megatron.core"}, "sets megatron_config,"),
    "unknown": ({"imports": "evil"}, "sets imports, which this program does not know"),
    "another kind": ({"peft_type": "PROMPT_TUNING"}, "describes PROMPT_TUNING, and not LORA"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_an_adapter_sets_only_what_is_known(kind, tmp_path):
    fields, said = STRANGE[kind]
    LoraConfig(r=8, lora_alpha=8).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    saved_adapter(AdapterConfig(), str(tmp_path), "embedded")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(RequestError, match=rf"model\.adapter: {file} {said}"):
        saved_adapter(AdapterConfig(), str(tmp_path), "embedded")
    if kind == "unknown":  # typed
        saved_adapter(AdapterConfig(extra={"imports": "evil"}), str(tmp_path), "embedded")


def test_a_base_brings_no_adapter(tmp_path):
    """Upstream would load the adapter's base in its place, and the adapter with whatever fields it has."""
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    LoraConfig(base_model_name_or_path="evil/base").save_pretrained(folder)
    with pytest.raises(RequestError, match=r"model\.id=.*holds an adapter.*model\.adapter=.*model"):
        load_model(compose(f"model.id={folder}").model)


def test_the_working_folder_holds_no_modules(marker, tmp_path):
    """Of the command, and of the processes that it starts."""
    folder = tmp_path / "data"
    for name in ("yaml", "typing", "pickle", "hydra", "omegaconf", "hydra_plugins/evil", "multiprocessing/__init__"):
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit(3)\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = (
        "import os, sys; sys.argv, sys.path[0] = ['-m'], os.getcwd(); import smolvlm_exp; import multiprocessing as m;"
        "child = m.get_context('spawn').Process(target=print); child.start(); child.join(); sys.exit(child.exitcode)"
    )
    for arguments in (["-m", "smolvlm_exp", "--help"], ["-c", child]):
        done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_a_data_set_brings_no_code(marker, tmp_path, processor):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os\nos.system('touch {marker}')\n")
    (folder / "dataset_infos.json").write_text("{}")
    with pytest.raises(RequestError, match=r"data\.id="):
        load_preferences(compose("data=rlaif_v", f"data.id={folder}").data, processor, tmp_path)


STATES = {
    "a file of rows": ("train/state.json", {"_data_files": [{"filename": "../../outside/data-00000-of-00001.arrow"}]}),
    "an absolute path": ("train/state.json", {"_data_files": [{"filename": "/etc/hostname"}]}),
    "a split": ("dataset_dict.json", {"splits": ["../outside"]}),
    "a link": ("train/state.json", None),
    "nonsense": ("train/state.json", {"_data_files": 1}),
}


@pytest.mark.parametrize("what", STATES)
def test_what_save_to_disk_wrote_names_its_own_files(what, tmp_path):
    rows = Dataset.from_dict({"question": ["q"] * 4, "chosen": ["a"] * 4, "rejected": ["b"] * 4})
    rows.save_to_disk(tmp_path / "outside")
    folder = tmp_path / "mine"
    DatasetDict({"train": rows}).save_to_disk(folder)
    name, changes = STATES[what]
    if changes:
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
    else:
        (stored,) = folder.glob("train/*.arrow")
        stored.unlink()
        stored.symlink_to(tmp_path / "outside" / stored.name)
    with pytest.raises(RequestError, match=r"lies outside of|leads out of|cannot be read as what save_to_disk writes"):
        load_saved(folder)


@pytest.mark.parametrize("named", ["link.png", "link.dat", "within/secret.png", "../secret.png"])
def test_an_image_folder_names_its_own_images(named, tmp_path):
    """In metadata.jsonl, also by a link that is not among the images."""
    folder, secret = tmp_path / "mine" / "train", tmp_path / "within" / "secret.png"
    for path, content in ((folder / "a.png", encoded("PNG")), (secret, encoded("PNG"))):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    if named.startswith("link"):
        (folder / named).symlink_to(secret)
    elif named.startswith("within"):
        (folder / "within").symlink_to(secret.parent)
    lines = [{"file_name": name, "question": "q", "chosen": "a", "rejected": "b"} for name in ("a.png", named)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RequestError, match=r"leads out of|Invalid metadata file_name"):
        find(compose("data=hub", f"data.id={folder.parent}").data).rows("train")


def test_files_of_rows_are_no_links_out(tmp_path, processor):
    mine, private = tmp_path / "mine", tmp_path / "private"
    for folder in (mine, private):
        folder.mkdir()
    write(private, [GOOD])
    (mine / "train.jsonl").symlink_to(private / "train.jsonl")
    for more in ({}, {"rows": "train.jsonl"}, {"rows": "../private/train.jsonl"}):
        with pytest.raises(RequestError, match="lies outside of it, or is a link that leads out"):
            load_preferences(config(mine, **more), processor, tmp_path)


def test_an_index_of_shards_names_its_own_files(tmp_path):
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "model"))
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(RequestError, match=rf"index\.json names {name}, and weights are read from the model's own"):
            load_model(compose(f"model.id={folder}").model)


def test_pictures_start_nothing(marker, tmp_path, monkeypatch):
    """A Ghostscript that tells when it is called; documents that would call it, or fetch something."""
    fake = tmp_path / "bin" / "gs"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch {marker}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    eps = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch {marker}) (w) file\nshowpage\n"
    svg = f'<!DOCTYPE s [<!ENTITY x SYSTEM "file://{marker}">]><svg xmlns="http://www.w3.org/2000/svg">&x;</svg>'
    for data in (eps.encode(), svg.encode(), b"push graphic-context\nviewbox 0 0 9 9\nimage over 0,0 0,0 '|touch x'\n"):
        with pytest.raises(ImageError, match="none of JPEG"):
            prepare_image(data, 512)


def test_a_bomb_is_refused_in_no_time():
    data = encoded("PNG", (11_000, 11_000), "1")
    assert len(data) < 2**16
    began = time.monotonic()
    with pytest.raises(ImageError, match=r"more than data\.max_pixels"):
        prepare_image(data, 512)
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("first", [False, True])
def test_a_tiff_of_very_many_pages_costs_no_time(first):
    """Each page is a directory of its own that leads to the next; counting 20,000 of them takes Pillow 12 seconds."""
    fields = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 1), (278, 1), (279, 1)]
    page = struct.pack("<H", len(fields)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    size = len(page) + 4
    pages = (page + struct.pack("<I", 8 + size * (n + 1) if n < 19_999 else 0) for n in range(20_000))
    data = b"II*\0" + struct.pack("<I", 8) + b"".join(pages)
    began = time.monotonic()
    if first:
        assert prepare_image(data, 512, ImageLimits(first_frame=True))[1] == (1, 1)
    else:
        with pytest.raises(ImageError, match="has several frames"):
            prepare_image(data, 512)
    assert time.monotonic() - began < 1


def test_nothing_outside_is_reached(processor, tmp_path, monkeypatch):
    """Rows that name files outside, links, URLs: no connection is tried, no such file is opened."""
    reached = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: reached.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: reached.append(a))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "good.png").write_bytes(encoded("PNG"))
    outside = tmp_path / "outside.png"
    outside.write_bytes(encoded("PNG"))
    (mine / "link.png").symlink_to(outside)
    named = {str(outside), "/etc/hostname"}
    sys.addaudithook(lambda event, a: reached.append(a[0]) if event == "open" and str(a[0]) in named else None)
    bad = [{**GOOD, "image": path} for path in (*PATHS, str(outside), "link.png", "../outside.png")]
    questions = [{**GOOD, "question": f"What is at {path}?"} for path in PATHS if path and "\0" not in path][:5]
    write(mine, [GOOD, *questions, *bad])
    found = load_preferences(config(mine, on_bad_row="skip", max_bad_rows=1.0), processor, tmp_path)
    assert len(found.train) == 1 + len(questions)
    assert reached == []
    words = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    picture = {"bytes": Value("binary"), "path": Value("string")}
    columns = Features(images=List(picture), prompt=words, chosen=words, rejected=words)
    message = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}]
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ("A star.", "A moon.")]
    rows = [
        {
            "images": [{"bytes": data, "path": str(outside)}],
            "prompt": message,
            "chosen": answers[0],
            "rejected": answers[1],
        }
        for data in (encoded("PNG"), None)
    ]
    Dataset.from_list(rows, features=columns).save_to_disk(tmp_path / "saved")
    hub = compose(
        "data=rlaif_v", f"data.id={tmp_path / 'saved'}", "data.train=train", "data.test=train",
        "data.on_bad_row=skip", "data.max_bad_rows=0.5",
    )  # fmt: skip
    assert len(load_preferences(hub.data, processor, tmp_path).train) == 1
    assert "only names it" in (tmp_path / "skipped_rows.jsonl").read_text()
    assert reached == []
