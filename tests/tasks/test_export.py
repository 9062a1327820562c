"""task=export: what is written, refused and published."""

import json
import shutil

import pytest

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.deploy.export.record import read_record
from smolvlm_exp.deploy.options import PARTS
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.models.resolution import Resolution
from smolvlm_exp.tasks.chat import load_session
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
        rows = () if "data=files" in overrides else ("data.test_rows=24",)
        return run_export(
            compose(
                "task=export", f"model.id={small}", "quant=none", "trainer.per_device_eval_batch_size=24",
                "task.max_new_tokens=8", *rows, *overrides,
            ),
            tmp_path,
        )  # fmt: skip

    return run


def files(folder):
    return sorted(path.name for path in (folder / "onnx").iterdir())


def test_onnx_in_8_bits_then_one_part_in_4_and_the_gate(export, capsys, bars):
    folder = export("export.precision=int8")["onnx"]
    assert bars["graphs in their precisions"] == (3, 3)
    assert {"log-probs of the answers", "answers"} < set(bars)
    int8 = sorted(f"{part}_int8.onnx" for part in PARTS)
    assert files(folder) == int8
    assert "preference accuracy" in capsys.readouterr().out
    record = read_record(folder)
    assert record["passes"]
    assert record["pairs"] == "data"
    assert record["parity"]["error"] < 0.2
    assert record["exported"].keys() == record["tuned"].keys() >= {"preference_accuracy", "chair_s", "yes_no_accuracy"}
    other = "export.precision=int8", "export.embed_tokens=int4", "export.max_error=0.001"
    with pytest.raises(RunError, match=r"onnx failed the parity gate .* and was not written"):
        export(*other)
    assert read_record(folder) == record
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "onnx"]
    capsys.readouterr()
    export(*other, "export.on_fail=mark")
    assert "WARNING: onnx failed the parity gate; written anyway (export.on_fail=mark)" in capsys.readouterr().out
    assert files(folder) == sorted([*int8, "embed_tokens_q4.onnx"])
    record = read_record(folder)
    assert (record["passes"], record["precisions"]["embed_tokens"]) == (False, "int4")
    ids = ["accuracy_drop", "logprob_error", "chair_s_increase", "yes_no_accuracy_drop"]
    assert [check["id"] for check in record["checks"]] == ids
    card = (folder / "README.md").read_text()
    assert "Parity check failed: differs from the tuned model" in card
    assert "x64quantprecision" in card  # what int8 parts need in other clients
    assert SmolVLMSession.load(folder).conversation().say("Describe the picture.").finish()


@pytest.mark.parametrize("form", ["onnx", "merged"])
def test_an_export_keeps_its_resolution_and_says_what_others_do_with_it(export, capsys, form):
    folder = export(f"export.format={form}", "model.longest_edge=256", "model.upscale=false")[form]
    assert "WARNING: only this program reads model.upscale=false" in capsys.readouterr().out
    assert read_record(folder)["resolution"]["longest_edge"] == 256
    assert "enlarge small images to 256 pixels" in " ".join((folder / "README.md").read_text().split())
    for told, expected in (((), 256), (("model.longest_edge=64",), 64)):
        session = load_session(compose("task=chat", f"model.id={folder}", "quant=none", *told))
        resolution = Resolution.of(session.processor.image_processor.to_dict())
        assert resolution == Resolution(64, expected, upscale=False)


def test_a_search_writes_the_smallest_precisions_that_pass(export, capsys):
    limits = ("export.max_error=0.012", "export.max_drop=0.05", "export.on_fail=mark")
    folder = export("export.search=true", *limits)["onnx"]
    tried = [line for line in capsys.readouterr().out.splitlines() if line.startswith("search: ")]
    assert 3 <= len(tried) <= 6, tried
    assert tried[0].startswith("search: decoder_model_merged int4, vision_encoder fp32, embed_tokens fp32")
    chosen = read_record(folder)["precisions"]
    assert chosen["decoder_model_merged"] == "int8", tried
    last = [line for line in tried if line.endswith("passes")][-1]
    assert all(f"{part} {kind}" in last for part, kind in chosen.items())
    assert read_record(folder)["parity"]["share"] <= 0.012


@pytest.fixture
def known(rows, tmp_path):
    """A folder of scenes with what is known of them, and no pairs: half of them are held out."""
    folder = tmp_path / "known"
    folder.mkdir()
    lines = []
    for number, row in enumerate(rows.train.select(range(16))):
        row["images"][0].save(folder / f"{number}.png")
        truth = {"image": f"{number}.png", "question": text_of(row["prompt"]), "truth": json.loads(row["truth"])}
        lines.append(json.dumps(truth) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return "data=files", f"data.folder={folder}", "data.test_fraction=0.5"


@pytest.mark.parametrize("settings", [("export.format=merged", "export.precision=fp32"), ("export.search=true",)])
def test_rows_without_pairs_are_compared_by_the_models_own_answers(export, known, capsys, settings):
    (folder,) = export(*known, *settings, "export.on_fail=mark").values()
    record = read_record(folder)
    assert record["pairs"] == "own_answers"
    assert 2 <= record["parity"]["rows"] <= 9
    assert record["exported"].keys() == record["tuned"].keys() >= {"preference_accuracy", "yes_no_accuracy"}
    assert "they are the model's own answers, in" in capsys.readouterr().out
    assert (
        "log-probs and `preference_accuracy` are of the tuned model's own answers" in (folder / "README.md").read_text()
    )
    if record["format"] == "merged":
        assert record["parity"]["error"] < 1e-6


def test_merged_with_its_card(export, tmp_path):
    (tmp_path / "training_args.bin").write_text("a token in clear")
    folder = export("export.format=merged", "export.precision=fp32", "export.license=apache-2.0")["merged"]
    record = read_record(folder)
    assert record["parity"]["error"] < 1e-6
    assert "training_args.bin" not in record["files"]
    card = (folder / "README.md").read_text()
    for expected in ("license: apache-2.0", "| held out | tuned | exported |", "data.source: shapes", "## Limits"):
        assert expected in card
    for unexpected in (str(tmp_path), "x64quantprecision", "Parity check failed"):
        assert unexpected not in card
    low, high = record["intervals"]["exported"]["preference_accuracy"]
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
def test_settings_that_cannot_work_are_refused(export, tmp_path, overrides, message):
    with pytest.raises(RequestError, match=message):
        export(*overrides)
    assert not (tmp_path / "export").exists()


def test_a_folder_with_other_files_is_refused(export, tmp_path):
    (tmp_path / "export" / "onnx").mkdir(parents=True)
    (tmp_path / "export" / "onnx" / "thesis.txt").write_text("")
    with pytest.raises(RequestError, match="thesis"):
        export()


@pytest.mark.slow
def test_a_run_exported_in_all_formats(command, tmp_path):
    """A four-bit DoRA run in all formats, evaluated by ONNX Runtime and used in a chat."""
    from tests.tasks.test_evaluate import QUICK

    quick = (*QUICK, "trainer.max_steps=20", "data.train_rows=256", "data.test_rows=24", "hydra.run.dir=outputs/a/run")
    assert command(*quick).returncode == 0
    exported = ("task=export", "run=last", "export.format=all", "export.precision=int8", "export.max_drop=0.1")
    done = command(*exported, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "merged into the dequantized base: answer log-prob error" in done.stdout
    root = tmp_path / "outputs" / "a" / "run" / "export"
    assert {path.name for path in root.iterdir() if path.is_dir()} == {"adapter", "merged", "onnx"}
    record = json.loads((root / "onnx" / "export.json").read_text())
    assert record["parity"]["share"] < 0.5
    for name in ("merged", "onnx"):
        spoken = command("task=chat", f"model.id={root / name}")
        assert spoken.returncode == 0, spoken.stderr
