"""P11: checkpoints of an earlier release resume. `release_0_1` is a run of this one at its fourth step.

Another release makes a folder of its own beside it: `python -m tests.reliability.test_release FOLDER`.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest

from smolvlm_exp.runs.checkpoint import MANIFEST, newest_intact
from smolvlm_exp.runs.resume_check import check_same_run
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import sha256
from tests.conftest import compose
from tests.reliability.conftest import LONG, Bench, logged

HERE = Path(__file__).parent
SETTINGS = ("trainer.save_steps=4", "adapter.lora_dropout=0", "trainer.eval_strategy=no")


@pytest.mark.parametrize("release", ["release_0_1"])
def test_a_checkpoint_of_an_earlier_release_resumes(bench, tmp_path, release):
    bench = Bench(bench.processor, bench.preferences, bench.cache)
    run = Path(shutil.copytree(HERE / release, tmp_path / "run"))
    wanted = {event["step"]: event for event in logged(run)}
    checkpoint = newest_intact(run)
    assert checkpoint.name == "checkpoint-4"
    allowed = "resume_allow=[versions,device,data.rows]"  # another Pillow may write the drawn scenes' bytes otherwise
    check_same_run(asdict(bench.config(*SETTINGS, "resume=it", allowed)), checkpoint, bench.preferences)
    trainer = bench.run(run, *SETTINGS)
    assert trainer.state.global_step == 8
    assert trainer.resumed_at == 4
    for event in logged(run):
        for name in ("loss", "grad_norm", "learning_rate", "rewards/margins", "num_tokens"):
            assert event[name] == pytest.approx(wanted[event["step"]][name], rel=1e-2, abs=1e-3), (name, event["step"])


def test_data_of_the_hub_had_sources_of_their_own(tmp_path):
    settings = asdict(compose("data=rlaif_v", "model=smolvlm", "tracker=none", "resume=it"))
    identity = {**check_same_run(settings, None), "data.source": "rlaif_v"}
    del identity["data.test_fraction"]
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "run.json").write_text(json.dumps(identity))
    check_same_run(settings, tmp_path / "checkpoint-1")
    settings["data"]["id"] = "another/set"
    with pytest.raises(RequestError, match=r"step 1\.\n  data\.id was .* and is \"another/set\"\nUndo"):
        check_same_run(settings, tmp_path / "checkpoint-1")


def make(folder: Path) -> None:
    """The fixture: the checkpoint of the fourth step, and what the whole run logged."""
    from smolvlm_exp.data.preferences import load_preferences
    from smolvlm_exp.models.model import EMBEDDED, load_processor

    processor = load_processor(compose().model)
    with tempfile.TemporaryDirectory() as scratch:
        rows = load_preferences(compose(*LONG[:5]).data, processor, Path(scratch))
        Bench(processor, rows, Path(scratch) / "cache").run(folder, *SETTINGS)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-8")
    checkpoint = newest_intact(folder)
    for path in (checkpoint / "adapter_config.json", checkpoint / "README.md"):  # where the base model happened to lie
        path.write_text(path.read_text().replace(str(EMBEDDED), "embedded"))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name in manifest["files"]:
        manifest["files"][name] = [(checkpoint / name).stat().st_size, sha256(checkpoint / name)]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
