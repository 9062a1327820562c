"""task=mine: pairs that data=files reads, a second run that completes the first, rounds of mining and training."""

import json
import shutil
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi

from smolvlm_exp.config.previous_run import resume_overrides
from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.rewards.pairs import ScoredAnswer, select_pairs
from smolvlm_exp.tasks import mining, rounds
from smolvlm_exp.tasks.mine import mine
from smolvlm_exp.utils.errors import RequestError, RunError
from tests.conftest import compose, read_lines

ROWS = 10
PLAIN = (
    "task=mine", "quant=none", "tracker=none", f"data.train_rows={ROWS}", "data.test_rows=4", "task.num_generations=4",
    "task.max_new_tokens=24",
)  # fmt: skip


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    """A folder with the pairs of ten rows, in chunks of four, and its summary."""
    folder = tmp_path_factory.mktemp("mined")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mining, "CHUNK", 4)
        summary = mine(compose(*PLAIN), folder)
    return folder, summary


@pytest.fixture
def copy(mined, tmp_path):
    return shutil.copytree(mined[0], tmp_path / "copy")


def test_the_pairs_follow_from_the_answers(mined):
    folder, summary = mined
    header, *rows = read_lines(folder / "answers.jsonl")
    assert (header["settings"]["seed"], len(rows)) == (0, ROWS)
    expected, scores = [], []
    for row in rows:
        own = [ScoredAnswer(**answer) for answer in row["answers"]]
        assert len(own) == 4
        assert all(answer.logp < 0 < answer.tokens for answer in own)
        scores += [answer.score for answer in own]
        expected += [(own[c].text, own[r].text) for c, r in select_pairs(own, 2, 0.5, 3.0, "likeliest")]
    pairs = read_lines(folder / "pairs.jsonl")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == expected != []
    assert all(pair["chosen_score"] - pair["rejected_score"] >= 0.5 for pair in pairs)
    assert {(pair["model"], pair["adapter"], pair["seed"]) for pair in pairs} == {("embedded", None, 0)}
    assert (summary["rows"], summary["answers"], summary["pairs"]) == (ROWS, 4 * ROWS, len(pairs))
    assert summary["rows_with_pairs"] + sum(summary["taught_nothing"].values()) == ROWS
    assert summary["reward"]["all_mean"] == pytest.approx(sum(scores) / len(scores))
    assert summary == json.loads((folder / "summary.json").read_text())


def test_a_moved_folder_is_read_as_data(copy, mined, processor, tmp_path):
    data = compose("data=files", f"data.folder={copy}", "data.train=train+test").data
    rows = load_preferences(data, processor, tmp_path, splits=("train",)).train
    pairs = read_lines(mined[0] / "pairs.jsonl")
    assert sorted(text_of(chosen) for chosen in rows["chosen"]) == sorted(pair["chosen"] for pair in pairs)
    assert {json.loads(truth)["kind"] for truth in rows["truth"]} <= {"caption", "yes_no", "number", "answer"}
    named = {name for pair in pairs for name in pair["images"]}
    assert named == {f"images/{path.name}" for path in (copy / "images").iterdir()}


def test_the_report_shows_scores_pairs_and_what_teaches_nothing(mined):
    folder, summary = mined
    page = (folder / "report.html").read_text()
    assert f"{summary['pairs']} pairs from {summary['rows_with_pairs']} of {ROWS} rows" in page
    for expected in ("Rows that teach nothing", "Chosen 1", "Rejected 1", "<dt>Truth</dt>", "image/png;base64"):
        assert expected in page


def test_an_interrupted_run_is_completed_as_if_it_had_not_been(copy, mined, monkeypatch, capsys, bars):
    monkeypatch.setattr(mining, "CHUNK", 4)
    lines = (copy / "answers.jsonl").read_text().splitlines(keepends=True)
    (copy / "answers.jsonl").write_text("".join(lines[:7]) + lines[7][:30])  # a chunk, two rows, a part of another
    for name in ("pairs.jsonl", "summary.json"):
        (copy / name).unlink()
    mine(compose(*PLAIN), copy)
    assert "10 rows, 4 of them answered" in capsys.readouterr().out
    assert bars["answers"] == (6, 6)
    for name in ("answers.jsonl", "pairs.jsonl"):
        assert (copy / name).read_text() == (mined[0] / name).read_text()


def test_other_limits_make_other_pairs_of_the_same_answers(copy, mined, monkeypatch):
    monkeypatch.setattr(mining, "Sampler", lambda *args: pytest.fail("the model was loaded"))
    summary = mine(compose(*PLAIN, "task.pairs_per_row=1"), copy)
    assert summary["pairs"] == summary["rows_with_pairs"] == mined[1]["rows_with_pairs"]
    with pytest.raises(RunError, match=r"fewer than two rows have pairs .*all_right.*lower task\.margin"):
        mine(compose(*PLAIN, "task.margin=9"), copy)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "has answers by seed=0, and here it is 1: undo the change"),
        (["task.temperature=0.5"], "has answers by task.temperature=1.0"),
        (["reward=objects"], "has answers by reward.weights."),
        (["data.scene_seed=1"], "has answers to other rows"),
    ],
)
def test_answers_by_other_settings_are_refused(copy, overrides, message):
    with pytest.raises(RequestError, match=message):
        mine(compose(*PLAIN, *overrides), copy)


def test_answers_of_other_weights_or_scores_are_refused(copy, tmp_path, monkeypatch):
    """Under the same names: an adapter that was trained further, a reward file that was edited."""
    monkeypatch.setattr(mining, "CHUNK", 4)
    answers = copy / "answers.jsonl"
    first, *rest = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join([first.replace('"weights": "', '"weights": "0'), *rest[:4]]))
    with pytest.raises(RequestError, match=r"has answers of other weights than those that model\.id=embedded"):
        mine(compose(*PLAIN), copy)
    reward = tmp_path / "mine.py"
    reward.write_text("def mine(completions, **_):\n    return [float(len(str(c))) for c in completions]\n")
    own = (*PLAIN, f"reward.user={reward}:mine")
    mine(compose(*own), tmp_path)
    reward.write_text(reward.read_text().replace("len(str(c))", "-len(str(c))"))
    with pytest.raises(RequestError, match=r"has answers by reward\.code\.mine=.*: undo the change"):
        mine(compose(*own), tmp_path)


def test_another_file_in_the_place_of_the_answers(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"image": "cat.jpg", "answer": "A cat."}\n')
    with pytest.raises(RequestError, match=r"answers\.jsonl is not a file of answers"):
        mine(compose(*PLAIN), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.rounds=1", "trainer=grpo"], "trainer=grpo samples answers of its own"),
        (["task.rounds=2", "adapter=pissa"], "adapter=pissa is saved with twice its rank"),
        (["task.push_to_hub=me/pairs"], "task.push_to_hub=me/pairs: "),
        (["+reward.weights.image_dependence=1"], "leave it out with ~reward.weights.image_dependence"),
        (["data=photos"], "No row says what is true of its image"),
        (["model.adapter=nowhere"], "model.adapter=nowhere: there is no adapter_config.json"),
    ],
)
def test_what_cannot_work_is_refused_before_sampling(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr(mining, "Sampler", lambda *args: pytest.fail("the model was loaded"))
    given = [o for o in PLAIN if not o.startswith("data.") or "data=photos" not in overrides]
    with pytest.raises(RequestError, match=message):
        mine(compose(*given, *overrides), tmp_path)


def test_pairs_are_pushed_with_their_images_and_nothing_else(copy, monkeypatch):
    hub = create_autospec(HfApi, instance=True)
    hub.whoami.return_value = {"name": "me"}
    monkeypatch.setattr("smolvlm_exp.tasks.hub.HfApi", lambda: hub)
    mine(compose(*PLAIN, "task.push_to_hub=me/pairs"), copy)
    hub.create_repo.assert_called_once_with("me/pairs", repo_type="dataset", private=True, exist_ok=True)
    uploaded = hub.upload_folder.call_args.kwargs
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/pairs", copy)
    assert uploaded["allow_patterns"] == ["pairs.jsonl", "images/*", "summary.json", "report.html"]


@pytest.fixture
def trained(monkeypatch):
    """Rounds whose training and evaluation are stand-ins; what each training was given."""
    given = []

    def train(config, folder, preferences):
        given.append((config, folder, preferences))
        (folder / "adapter").mkdir()
        (folder / "summary.json").write_text(
            json.dumps({"status": "done", "before": {"recall": 0.5}, "after": {"recall": 0.6}})
        )
        return {"status": "done"}

    monkeypatch.setattr(rounds, "train", train)
    monkeypatch.setattr(rounds, "evaluate", lambda config, folder: {"status": "done", "adapter": config.model.adapter})
    monkeypatch.setattr("smolvlm_exp.tasks.mining.load_finetuned_model", base)
    return given


def base(model, quant, adapter, seed):
    from smolvlm_exp.models.model import load_model

    return load_model(model, None, seed)


def test_each_round_goes_on_from_the_one_before(trained, tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- task=mine\n")
    summary = mine(compose(*PLAIN, "task.rounds=2"), tmp_path)
    (first, one, rows), (second, two, _) = trained
    assert (one, two) == (tmp_path / "round-1", tmp_path / "round-2")
    assert (first.model.adapter, second.model.adapter) == (None, str(one))
    assert (first.task.name, first.task.max_new_tokens, first.data.source) == ("train", 24, "shapes")
    pairs = [read_lines(folder / "pairs" / "pairs.jsonl") for folder in (one, two)]
    assert sorted(text_of(chosen) for chosen in rows.train["chosen"]) == sorted(pair["chosen"] for pair in pairs[0])
    assert {pair["seed"] for pair in pairs[0]} == {0}
    assert [pair["chosen"] for pair in pairs[0]] != [pair["chosen"] for pair in pairs[1]]
    assert (len(rows.test), rows.report["test"]["also_in_train"]) == (4, 0)
    assert [entry["after"] for entry in summary["rounds"]] == [{"recall": 0.6}] * 2
    assert summary["adapter"] == str(tmp_path)
    assert (tmp_path / "adapter").is_dir()
    assert (two / ".hydra" / "overrides.yaml").is_file()
    mine(compose(*PLAIN, "task.rounds=2"), tmp_path)
    assert len(trained) == 2, "finished rounds stay as they are"


def test_a_stopped_round_ends_the_task(tmp_path, monkeypatch, trained):
    monkeypatch.setattr(rounds, "train", lambda *args, **kwargs: {"status": "stopped"})
    assert mine(compose(*PLAIN, "task.rounds=2"), tmp_path) == {"status": "stopped"}
    assert not (tmp_path / "round-2").exists()


def test_resume_is_the_same_command_in_the_same_folder(tmp_path):
    hydra = tmp_path / ".hydra"
    hydra.mkdir()
    (hydra / "overrides.yaml").write_text("- task=mine\n- data.train_rows=8\n- hydra.run.dir=elsewhere\n")
    (hydra / "config.yaml").write_text("task:\n  name: mine\n")
    (hydra / "hydra.yaml").write_text("hydra:\n  runtime:\n    config_sources: []\n    choices: {}\n")
    given = {"resume": str(tmp_path), "hydra.run.dir": "elsewhere"}
    expected = ["task=mine", "data.train_rows=8", f"hydra.run.dir={tmp_path}", "hydra.output_subdir=null"]
    assert resume_overrides(given, multirun=False) == expected


@pytest.mark.slow
def test_two_rounds_and_an_evaluation_of_what_they_made(command, tmp_path):
    short = ("trainer.max_steps=3", "trainer.sample_steps=0", "trainer.warmup_steps=0", "trainer.save_strategy=no")
    done = command("experiment=mine", *PLAIN[2:], "data.train_rows=40", *short, "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    first, second = summary["rounds"]
    for name in ("preference_accuracy", "recall", "blank_image_drop"):
        assert second["before"][name] == pytest.approx(first["after"][name], abs=1e-5)
        assert summary["before"][name] == pytest.approx(first["before"][name], abs=1e-5)
        assert summary["after"][name] == pytest.approx(second["after"][name], abs=1e-5)
    for run in ("out", "out/round-1"):
        done = command("task=evaluate", f"run={run}", f"hydra.run.dir=again/{run}", "tracker=none")
        assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "out" / "summary.json").read_text())
    assert again["after"] == pytest.approx(summary["after"], abs=1e-5)
