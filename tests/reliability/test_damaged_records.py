"""P3, of what is no checkpoint: a damaged record of a sweep, of a job, of answers is one error that names the file."""

import json
import shutil

import pytest

from smolvlm_exp.models.adapter import saved_adapter
from smolvlm_exp.runs.checkpoint import newest_intact
from smolvlm_exp.runs.sweep_record import Job, read_keys, write_jobs
from smolvlm_exp.sweep.job_process import remaining_time
from smolvlm_exp.sweep.results import read_results
from smolvlm_exp.tasks.generate import answered
from smolvlm_exp.tasks.mining import read_answers
from smolvlm_exp.utils.errors import RequestError
from tests.reliability.conftest import command_line

DEEP = "[" * 100_000
HEADER = {"settings": {"seed": 0}, "round": 0}


@pytest.mark.parametrize("content", ['{"jobs": [{}]}', '{"jobs": 5}', '{"jobs": [{"number": 0, "overrides": 5}]}'])
def test_a_sweeps_jobs(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(RequestError, match=r"sweep\.json is damaged"):
        command_line(f"sweep={tmp_path}", multirun=True)


@pytest.mark.parametrize("content", [None, "", "hydra: 5", "hydra: {overrides: {task: 5, hydra: []}}", "[", "\x00"])
def test_a_sweeps_configuration(tmp_path, content):
    write_jobs(tmp_path, [Job(0, ("seed=1",))], [])
    if content is not None:
        (tmp_path / "multirun.yaml").write_text(content)
    with pytest.raises(RequestError, match=r"multirun\.yaml is damaged"):
        command_line(f"sweep={tmp_path}", multirun=True)


@pytest.mark.parametrize("seconds", ["", ', "seconds": null', ', "seconds": "x"', ', "seconds": 60'])
def test_a_jobs_summary(tmp_path, seconds):
    write_jobs(tmp_path, [Job(0, ("seed=1",)), Job(1, ("seed=2",))], ["seed"])
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "summary.json").write_text(f'{{"status": "done"{seconds}}}')
    more = ", about 1 min 00 s one after the other" if "60" in seconds else ""
    assert remaining_time(read_results(tmp_path, None)) == f"; 1 of 2 jobs left{more}"


def test_a_sweeps_keys(tmp_path):
    (tmp_path / "sweep.json").write_text('{"jobs": [], "keys": 5}')
    assert read_keys(tmp_path) == []


LINES = (
    '{"settings": null}', '{"settings": []}', DEEP, f'{json.dumps(HEADER)}\n{{"row": "zz", "answers": []}}',
    f"{json.dumps(HEADER)}\n{DEEP}", f'{json.dumps(HEADER)}\n{{"row": "00", "answers": [5]}}',
)  # fmt: skip


@pytest.mark.parametrize("lines", LINES)
def test_answers(tmp_path, lines):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{lines}\n")
    with pytest.raises(RequestError, match=r"answers\.jsonl is not a file of answers"):
        read_answers(path, HEADER, [b"\0"])
    path.write_text(f"{DEEP}\n")
    with pytest.raises(RequestError, match=r"answers\.jsonl, line 1: this is not a file of answers"):
        answered(path, ("answer",))


def test_a_checkpoint_that_is_named_as_the_adapter(built, bench, tmp_path):
    """It is verified as one that is resumed from; a processor beside it is nobody's damage."""
    checkpoint = shutil.copytree(newest_intact(built), tmp_path / "checkpoint-1")
    (checkpoint / "processor_config.json").write_text("{}")
    adapter = bench.config().adapter
    assert saved_adapter(adapter, str(checkpoint), "embedded") == checkpoint
    weights = bytearray((checkpoint / "adapter_model.safetensors").read_bytes())
    weights[-5] ^= 1
    (checkpoint / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(RequestError, match=r"model\.adapter: .*checkpoint-1 is damaged: adapter_model\.safetensors"):
        saved_adapter(adapter, str(checkpoint), "embedded")
