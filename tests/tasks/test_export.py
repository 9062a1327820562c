"""task=export: what is written, what is held back, what is refused, what is published."""

import json
import shutil

import pytest

from smolvlm_exp.deploy.export.options import PARTS
from smolvlm_exp.deploy.export.record import read_record
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.tasks.export import export as run_export
from smolvlm_exp.utils.errors import RequestError, RunError
from tests.conftest import compose


@pytest.fixture
def export(small, graphs, tmp_path, monkeypatch):
    """task=export of the small model, whose graphs in float32 are there already."""
    from smolvlm_exp.deploy.export import onnx_export as onnx

    def copied(model, folder):
        for part in PARTS:
            shutil.copy(graphs / "onnx" / f"{part}.onnx", folder)

    monkeypatch.setattr(onnx, "export_graphs", copied)

    def run(*overrides):
        return run_export(
            compose(
                "task=export", f"model.id={small}", "quant=none", "data.test_rows=24",
                "trainer.per_device_eval_batch_size=24", "task.max_new_tokens=8", *overrides,
            ),
            tmp_path,
        )  # fmt: skip

    return run


def files(folder):
    return sorted(path.name for path in (folder / "onnx").iterdir())


def test_onnx_in_8_bits_and_then_in_4_beside(export, capsys):
    folder = export("export.precision=int8")["onnx"]
    assert files(folder) == sorted(f"{part}_int8.onnx" for part in PARTS)
    assert "preference accuracy" in capsys.readouterr().out
    found = read_record(folder)
    assert found["passes"]
    assert found["parity"]["error"] < 0.2
    assert found["exported"].keys() == found["tuned"].keys() >= {"preference_accuracy", "chair_s", "yes_no_accuracy"}
    export("export.precision=int8", "export.embed_tokens=int4", "export.on_fail=mark", "export.max_drop=1")
    assert files(folder) == sorted([*(f"{part}_int8.onnx" for part in PARTS), "embed_tokens_q4.onnx"])
    session = SmolVLMSession.load(folder)
    assert read_record(folder)["precisions"]["embed_tokens"] == "int4"
    assert session.conversation().say("Describe the picture.").finish()


def test_a_search_gives_up_the_bits_that_are_not_missed(export, capsys):
    folder = export("export.search=true", "export.max_error=0.012", "export.max_drop=0.05", "export.on_fail=mark")[
        "onnx"
    ]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("search: ")]
    assert 3 <= len(told) <= 6, told
    assert told[0].startswith("search: decoder_model_merged int4, vision_encoder fp32, embed_tokens fp32")
    chosen = read_record(folder)["precisions"]
    assert chosen["decoder_model_merged"] == "int8", told
    last = [line for line in told if line.endswith("passes")][-1]
    assert all(f"{part} {kind}" in last for part, kind in chosen.items())
    assert read_record(folder)["parity"]["share"] <= 0.012
    assert "x64quantprecision" in (folder / "README.md").read_text()  # int8 parts, and what they ask of others


def test_the_gate(export, tmp_path, capsys):
    with pytest.raises(RunError, match=r"onnx failed the parity gate .* and was not written"):
        export("export.precision=int4", "export.max_error=0.001")
    assert [path.name for path in (tmp_path / "export").iterdir()] == [".lock"]
    folder = export("export.precision=int4", "export.max_error=0.001", "export.on_fail=mark")["onnx"]
    record = read_record(folder)
    assert not record["passes"]
    ids = ["accuracy_drop", "logprob_error", "chair_s_increase", "yes_no_accuracy_drop"]
    assert [check["id"] for check in record["checks"]] == ids
    card = (folder / "README.md").read_text()
    assert "Parity check failed: differs from the tuned model" in card
    assert "x64quantprecision" not in card
    assert "WARNING: onnx failed the parity gate; written anyway (export.on_fail=mark)" in capsys.readouterr().out


def test_merged_and_its_card(export, tmp_path):
    (tmp_path / "training_args.bin").write_text("a token in clear")
    folder = export("export.format=merged", "export.precision=fp32", "export.license=apache-2.0")["merged"]
    found = read_record(folder)
    assert found["parity"]["error"] < 1e-6
    assert "training_args.bin" not in found["files"]
    card = (folder / "README.md").read_text()
    for expected in ("license: apache-2.0", "| held out | tuned | exported |", "data.source: shapes", "## Limits"):
        assert expected in card
    assert str(tmp_path) not in card
    low, high = found["intervals"]["exported"]["preference_accuracy"]
    assert f"({low:.3f} to {high:.3f})" in card


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export.format=merged", "export.precision=int4"], "merged weights are not stored in 4 bits"),
        (["export.precision=bf16"], "ONNX Runtime has no bf16 on a CPU"),
        (["export.format=adapter"], "there is no adapter; set run=FOLDER"),
        (["export.format=merged", "export.search=true"], "export.search needs export.format=onnx"),
        (["export.search=true", "export.embed_tokens=int8"], "chooses export.embed_tokens itself"),
        (["export.push_to_hub=me/it"], "export.push_to_hub=me/it: "),
    ],
)
def test_what_cannot_be_exported(export, tmp_path, overrides, message):
    with pytest.raises(RequestError, match=message):
        export(*overrides)
    assert not (tmp_path / "export").exists()


def test_a_folder_with_something_else_in_it(export, tmp_path):
    (tmp_path / "export" / "onnx").mkdir(parents=True)
    (tmp_path / "export" / "onnx" / "thesis.txt").write_text("")
    with pytest.raises(RequestError, match="thesis"):
        export()


def test_what_is_published(export, monkeypatch):
    import huggingface_hub

    class Hub:
        calls: list = []  # noqa: RUF012

        def whoami(self):
            return {"name": "me"}

        def create_repo(self, name, private, exist_ok):
            self.calls.append((name, private, exist_ok))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
            self.calls.append((repo_id, sorted(p.name for p in folder_path.iterdir()), ignore_patterns))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    export("export.format=merged", "export.precision=fp32", "export.push_to_hub=me/it")
    (created, (name, sent, never)) = Hub.calls
    assert created == ("me/it", True, True)
    assert name == "me/it"
    assert {"README.md", "model.safetensors", "export.json"} <= set(sent)
    assert {"training_args.bin", "**/training_args.bin"} <= set(never)


@pytest.mark.slow
def test_a_run_the_whole_way(command, tmp_path):
    """A run, its four-bit DoRA in all forms, evaluated by ONNX Runtime, talked to."""
    from tests.test_evaluate import QUICK

    quick = (*QUICK, "trainer.max_steps=20", "data.train_rows=256", "data.test_rows=24", "hydra.run.dir=outputs/a/run")
    assert command(*quick).returncode == 0
    exported = ("task=export", "run=last", "export.format=all", "export.precision=int8", "export.max_drop=0.1")
    done = command(*exported, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "merged into the dequantised base: answer log-prob error" in done.stdout
    root = tmp_path / "outputs" / "a" / "run" / "export"
    assert {path.name for path in root.iterdir() if path.is_dir()} == {"adapter", "merged", "onnx"}
    record = json.loads((root / "onnx" / "export.json").read_text())
    assert record["parity"]["share"] < 0.5
    for name in ("merged", "onnx"):
        spoken = command("task=chat", f"model.id={root / name}")
        assert spoken.returncode == 0, spoken.stderr
