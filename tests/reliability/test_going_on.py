"""P5 and P10: a run that is asked to stop saves and goes on exactly; another run's checkpoint is refused."""

import copy
import itertools
import json
import os
import re
import shutil
import signal
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, TrainerCallback

from smolvlm_exp import main
from smolvlm_exp.models.model import ModelConfig, load_model, load_processor
from smolvlm_exp.models.quant import quantization_config
from smolvlm_exp.runs import resume_check as same
from smolvlm_exp.runs.checkpoint import checkpoint_folders, damage, newest_intact
from smolvlm_exp.runs.resume_check import check_same_run
from smolvlm_exp.tasks import result
from smolvlm_exp.tasks.train import reward_files, train
from smolvlm_exp.training import trainers as reliable
from smolvlm_exp.training.callbacks import StopCallback
from smolvlm_exp.utils.errors import RequestError, RunError
from tests.conftest import compose
from tests.reliability.conftest import LONG, forked, learnt, logged


def signalled(trainer, where, step, number):
    """Send a signal to this process at the first call of `where` in this step or a later one."""

    def at(function):
        def call(*args, **kwargs):
            nonlocal done
            if not done and trainer.state.global_step + 1 >= step:
                done = True
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        return call

    done = False
    if where == "a save":
        reliable.finalise = at(reliable.finalise)  # undone by the fixture
    else:
        owner, name = {
            "data loading": (trainer.batches, "collate_fn"),
            "forward": (trainer.model, "forward"),
            "between micro-batches": (trainer.accelerator, "backward"),
            "evaluation": (trainer, "prediction_step"),
        }[where]
        setattr(owner, name, at(getattr(owner, name)))


SELDOM = "trainer.eval_steps=6"
PLACES = (
    ("data loading", signal.SIGINT, 2),
    ("a save", signal.SIGTERM, 3),
    ("forward", signal.SIGINT, 5),
    ("evaluation", signal.SIGHUP, 6),
    ("between micro-batches", signal.SIGINT, 8),
)


def test_a_signal_anywhere_saves_and_the_run_goes_on_exactly(bench, tmp_path, monkeypatch, capsys):
    """One run that is stopped in five places, and goes on after each."""
    monkeypatch.setattr(reliable, "finalise", reliable.finalise)
    whole = bench.run(tmp_path / "whole", SELDOM)
    run, stops = tmp_path / "run", []
    for where, number, step in PLACES:
        trainer, stop = bench.stoppable(run, SELDOM, prepare=lambda t, w=where, s=step, n=number: signalled(t, w, s, n))
        assert stop.requested, where
        assert damage(newest_intact(run)) == ""
        assert newest_intact(run).name == f"checkpoint-{trainer.state.global_step}"
        stops.append(trainer.state.global_step)
        assert "again to exit at once" in capsys.readouterr().err
    assert stops == [2, 4, 5, 6, 8]  # the evaluation after step 6 was ended, and came first when the run resumed
    trainer = bench.run(run, SELDOM)
    assert logged(run) == logged(tmp_path / "whole")
    assert all(p.equal(learnt(whole)[name]) for name, p in learnt(trainer).items())


def test_a_signal_in_the_last_step_loses_nothing(bench, tmp_path):
    """Even where nothing is to be saved on the way: what was stopped is saved, and its end is reached from there."""
    short = ("trainer.max_steps=2", "trainer.save_strategy=no", "trainer.eval_strategy=no")
    trainer, stop = bench.stoppable(tmp_path, *short, prepare=lambda t: signalled(t, "forward", 2, signal.SIGINT))
    assert stop.requested
    assert newest_intact(tmp_path).name == "checkpoint-2"
    again = bench.run(tmp_path, *short)
    assert again.state.global_step == 2  # and not one step more
    assert all(p.equal(learnt(trainer)[name]) for name, p in learnt(again).items())


@pytest.mark.usefixtures("unseen")
def test_a_signal_after_the_last_step_loses_nothing_either(quick, tmp_path):
    """Between the last step and the evaluation after it, with trainer.save_strategy=no: it is saved then."""

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(quick(), tmp_path, watchers=[AtTheEnd()])["status"] == "stopped"
    assert newest_intact(tmp_path).name == "checkpoint-3"
    assert train(quick(f"resume={tmp_path}"), tmp_path)["status"] == "done"


@pytest.mark.parametrize(("step", "code"), [(2, 75), (0, 130)])
def test_a_second_signal_leaves_at_once(bench, tmp_path, step, code):
    """With 75 where a checkpoint is there to resume from, else 130."""

    def job():
        def twice(trainer):
            forward = trainer.model.forward

            def call(*args, **kwargs):
                if trainer.state.global_step == step and trainer.model.training:
                    os.kill(os.getpid(), signal.SIGINT)
                    stop.first -= 2  # two seconds later
                    os.kill(os.getpid(), signal.SIGINT)
                return forward(*args, **kwargs)

            trainer.model.forward = call

        with StopCallback() as stop:
            bench.run(tmp_path, "trainer.save_steps=1", callbacks=(stop,), prepare=twice)

    _, status = os.waitpid(forked(job, tmp_path / "log"), 0)
    assert os.waitstatus_to_exitcode(status) == code, (tmp_path / "log").read_text()[-2000:]
    assert [path.name for path in checkpoint_folders(tmp_path)[-1:]] == ["checkpoint-2"][: bool(step)]


def test_before_the_first_step_a_signal_stops_at_once(quick, tmp_path, monkeypatch, capsys):
    """While rows are evaluated, and as SIGTERM too: nothing was saved, so the exit code is 130."""
    monkeypatch.setattr(
        "smolvlm_exp.tasks.result.evaluate", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(KeyboardInterrupt):
        train(quick(), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("stopped", "Stopped before the first step.")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="130"):
        main.exit_stopped("train", tmp_path)
    assert "before the first step; nothing was saved" in capsys.readouterr().err


@pytest.mark.usefixtures("unseen")
def test_the_last_evaluation_is_finished_or_left_for_resume(quick, tmp_path, monkeypatch, capsys):
    """Although nothing was saved on the way (trainer.save_strategy=no)."""
    look, looks, clock = result.evaluate, [], itertools.count(0, 10)

    def evaluate(*args, **kwargs):
        looks.append(None)
        for _ in range(len(looks) // 2 if len(looks) % 2 == 0 else 0):  # after training, of the second run two
            os.kill(os.getpid(), signal.SIGINT)
        return look(*args, **kwargs)

    monkeypatch.setattr(result, "evaluate", evaluate)
    monkeypatch.setattr("smolvlm_exp.utils.signals.time", SimpleNamespace(monotonic=lambda: next(clock)))
    for status in ("done", "stopped"):
        folder = tmp_path / status
        folder.mkdir()
        assert train(quick(), folder)["status"] == status
        assert "finishing the evaluation; press Ctrl-C again to leave it for resume" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="75"):
        main.exit_stopped("train", folder)
    assert f"resume={folder}" in capsys.readouterr().err
    assert newest_intact(folder).name == "checkpoint-3"


# Another run's checkpoint

CHANGES = {
    "adapter.r": (4, "was 2 and is 4"),
    "adapter.target": ("recipe", 'was "text" and is "recipe"'),
    "adapter.use_dora": (False, "was true and is false"),
    "adapter.lora_dropout": (0.0, "was 0.1 and is 0.0"),
    "quant.load_in_4bit": (False, "was true and is false"),
    "trainer.optim": ("sgd", 'was "adamw_torch" and is "sgd"'),
    "trainer.learning_rate": (1e-4, "was 0.001 and is 0.0001"),
    "trainer.per_device_train_batch_size": (4, "was 2 and is 4"),
    "trainer.gradient_accumulation_steps": (4, "was 2 and is 4"),
    "trainer.max_steps": (9, "was 8 and is 9"),
    "trainer.lr_scheduler_type": ("constant", 'was "cosine" and is "constant"'),
    "trainer.engine": ("stock", 'was "shared" and is "stock"'),
    "trainer.beta": (0.2, "was 0.1 and is 0.2"),
    "trainer.extra": ({"adam_beta2": 0.9}, "trainer.extra.adam_beta2 was not set and is 0.9"),
    "data.train_rows": (20, "was 16 and is 20"),
    "data.max_edge": (64, "was 512 and is 64"),
    "model.longest_edge": (64, "was null and is 64"),
    "model.id": ("elsewhere", 'small0" and is "elsewhere"'),
    "seed": (1, "was 0 and is 1"),
}


def changed(config, key, value, allow=()):
    """A copy of a configuration with another value, as it is when a command resumes."""
    config = copy.deepcopy(config)
    config.resume, config.resume_allow = "it", list(allow)
    part, _, name = key.rpartition(".")
    setattr(getattr(config, part) if part else config, name, value)
    return config


@pytest.fixture(scope="module")
def saved(bench, tmp_path_factory):
    """A checkpoint of LONG at its first step."""
    folder = tmp_path_factory.mktemp("saved")
    stop = StopCallback()
    stop.requested = True
    bench.run(folder, callbacks=(stop,))
    return newest_intact(folder)


def test_a_changed_setting_is_refused_unless_it_is_named(bench, saved, capsys):
    config = bench.config()
    check_same_run(asdict(config), saved)
    for key, (value, said) in CHANGES.items():
        with pytest.raises(RequestError) as refusal:
            check_same_run(asdict(changed(config, key, value)), saved)
        told = str(refusal.value)
        assert "not the run that was saved at step 1" in told
        assert said in told
        assert key in told.rpartition("resume_allow=[")[2]
        check_same_run(asdict(changed(config, key, value, allow=[key])), saved)
        assert said in capsys.readouterr().out


def test_versions_machine_and_rows_count_too(bench, saved, monkeypatch):
    config = bench.config("resume=it")
    check_same_run(asdict(config), saved, bench.preferences)
    rows = bench.preferences.train
    for others in (rows.select(range(15)), rows.select([1, 0, *range(2, 16)])):
        other = type(bench.preferences)(others, bench.preferences.test, {})
        with pytest.raises(RequestError, match=r"data\.rows: the training rows or their images have changed"):
            check_same_run(asdict(config), saved, other)
        check_same_run(asdict(bench.config("resume=it", "resume_allow=[data.rows]")), saved, other)
    monkeypatch.setattr(same, "versions", lambda: {"torch": "9.9", "transformers": "9.9"})
    with pytest.raises(RequestError, match=r'versions.torch was ".*" and is "9.9"'):
        check_same_run(asdict(config), saved)
    check_same_run(asdict(bench.config("resume=it", "resume_allow=[versions]")), saved)


def test_another_kind_of_gpu_or_attention_is_refused(bench, monkeypatch, tmp_path):
    """`auto` is flash-attention where that is installed."""
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"), generation_config=GenerationConfig())
    monkeypatch.setattr("smolvlm_exp.engine.fingerprint.weights_key", lambda *args: "the same")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    settings = asdict(bench.config("resume=it"))
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "run.json").write_text(json.dumps(check_same_run(settings, None, model=model)))
    check_same_run(settings, tmp_path / "checkpoint-1", model=model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RequestError, match=r'model\.attention was "sdpa" and is "flash_attention_2"'):
        check_same_run(settings, tmp_path / "checkpoint-1", model=model)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA L4")
    with pytest.raises(RequestError, match='gpu was "NVIDIA H200" and is "NVIDIA L4"'):
        check_same_run(settings, tmp_path / "checkpoint-1")


def test_a_launcher_does_not_change_the_precision(bench, monkeypatch, tmp_path):
    """`accelerate launch --mixed_precision bf16`, or its configuration file, would for one half of a run."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(RequestError, match=r"ACCELERATE_MIXED_PRECISION=bf16 .* model\.dtype's, here torch\.float32"):
        bench.trainer(tmp_path)


def test_words_that_rewards_read_by_may_not_appear(bench, tmp_path):
    """Where no row named an object, and a held-out one does now."""
    settings = asdict(bench.config("trainer=grpo", "resume=it"))
    (tmp_path / "checkpoint-1").mkdir()
    identity = check_same_run(settings, None, rewards=reward_files(SimpleNamespace(hashes={}), bench.preferences))
    assert identity[same.WORDS]
    for before in (None, identity[same.WORDS]):
        (tmp_path / "checkpoint-1" / "run.json").write_text(json.dumps({**identity, same.WORDS: before}))
        now = replace(bench.preferences, words=None if before else bench.preferences.words)
        with pytest.raises(RequestError, match=r"reward\.words: the words that name objects have changed"):
            check_same_run(settings, tmp_path / "checkpoint-1", rewards=reward_files(SimpleNamespace(hashes={}), now))


def test_rows_without_answers_are_those_with_the_same_truth(bench):
    rows = bench.preferences.train.select(range(3))
    asked = rows.remove_columns(["chosen", "rejected"])
    changed = asked.map(lambda row: {"truth": row["truth"].replace("o", "0")})
    assert len({same.digest(rows), same.digest(asked), same.digest(asked.select([0, 1])), same.digest(changed)}) == 4
    assert same.digest(rows) == same.digest(rows.remove_columns("truth"))  # pairs are learned from, not their truth


@pytest.mark.parametrize(
    ("settings", "split", "said"),
    [
        (("trainer.load_best_model_at_end=true",), "test", "data.held_out: the held-out rows have changed"),
        (("trainer.early_stopping_patience=3",), "test", "data.held_out: the held-out rows have changed"),
        (("trainer=grpo",), "train", "data.truth: the truth of the training rows has changed"),
    ],
)
def test_rows_that_decide_count_besides_the_answers(bench, tmp_path, settings, split, said):
    """Held-out rows by which the best checkpoint is chosen; the truth of rows that have answers too."""
    identity = check_same_run(asdict(bench.config(*settings)), None, bench.preferences)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "run.json").write_text(json.dumps(identity))
    resumed = asdict(bench.config(*settings, "resume=it"))
    check_same_run(resumed, tmp_path / "checkpoint-1", bench.preferences)
    other = getattr(bench.preferences, split).map(lambda row: {"truth": row["truth"].replace("o", "0")})
    with pytest.raises(RequestError, match=re.escape(said)):
        check_same_run(resumed, tmp_path / "checkpoint-1", replace(bench.preferences, **{split: other}))
    allowed = asdict(bench.config(*settings, "resume=it", "resume_allow=[data]"))
    check_same_run(allowed, tmp_path / "checkpoint-1", replace(bench.preferences, **{split: other}))
    (tmp_path / "checkpoint-1" / "run.json").write_text("[")
    with pytest.raises(RequestError, match=r"checkpoint-1 has no run\.json that can be read"):
        check_same_run(resumed, tmp_path / "checkpoint-1", bench.preferences)


def test_the_base_is_the_one_it_was(bench, saved):
    """A folder's weights may be written over, a branch on the hub may move: their names would not tell."""
    config = bench.config("resume=it")
    model = load_model(config.model, quantization_config(config.quant, torch.float32), config.seed)
    check_same_run(asdict(config), saved, bench.preferences, model)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1e-3
    with pytest.raises(RequestError, match=r"model\.base: the weights that the run starts from have changed"):
        check_same_run(asdict(config), saved, bench.preferences, model)
    check_same_run(asdict(bench.config("resume=it", "resume_allow=[model.base]")), saved, bench.preferences, model)


def test_the_generation_config_is_the_one_it_was(bench, saved, tmp_path):
    """What answers are sampled by where the engine's sampler does not run."""
    config = bench.config("resume=it")
    model = load_model(config.model, quantization_config(config.quant, torch.float32), config.seed)
    model.generation_config.repetition_penalty = 1.3
    with pytest.raises(RequestError, match=r"model\.generation_config was {.*} and is {.*repetition_penalty\W+1\.3"):
        check_same_run(asdict(config), saved, bench.preferences, model)
    allowed = bench.config("resume=it", "resume_allow=[model.generation_config]")
    check_same_run(asdict(allowed), saved, bench.preferences, model)
    earlier = shutil.copytree(saved, tmp_path / "checkpoint-1")  # of a release that did not record it
    identity = json.loads((earlier / same.IDENTITY).read_text())
    del identity[same.GENERATION]
    (earlier / same.IDENTITY).write_text(json.dumps(identity))
    check_same_run(asdict(config), earlier, bench.preferences, model)


def test_the_processor_is_the_one_it_was(bench, saved, tmp_path):
    """By content: the base's files may have been written over, and older versions read them otherwise."""
    checkpoint = shutil.copytree(saved, tmp_path / "checkpoint-1")
    before, config = bench.processor, bench.config("resume=it")
    identity = check_same_run(asdict(config), None, processor=before)
    (checkpoint / same.IDENTITY).write_text(json.dumps(identity))
    check_same_run(asdict(config), checkpoint, processor=before)
    before.save_pretrained(tmp_path / "model")
    for name, part, old, new in (
        ("tokenizer.json", "tokenizer", '"individual_digits": true', '"individual_digits": false'),
        ("chat_template.jinja", "chat_template", "Assistant:", "Answer:"),
        ("processor_config.json", "image_processor", '"longest_edge": 128', '"longest_edge": 64'),
    ):
        file = tmp_path / "model" / name
        content = file.read_text()
        file.write_text(content.replace(old, new))
        other = load_processor(ModelConfig(id=str(tmp_path / "model")))
        file.write_text(content)
        with pytest.raises(RequestError, match=rf"model\.{part}: the .* has changed"):
            check_same_run(asdict(config), checkpoint, processor=other)
        allowed = bench.config("resume=it", f"resume_allow=[model.{part}]")
        check_same_run(asdict(allowed), checkpoint, processor=other)


def test_a_run_from_before_tokenizers_split_digits_says_so(bench, saved):
    settings = asdict(bench.config("resume=it", "model.id=embedded", "resume_allow=[model.id]"))
    check_same_run(settings, saved, processor=bench.processor)  # the embedded model's tokenizer was read right
    settings["model"]["id"] = "some/idefics3"
    with pytest.raises(RequestError) as refusal:
        check_same_run(settings, saved, processor=bench.processor)
    said = "model.tokenizer: the run did not record the tokenizer; it began when tokenizers of Idefics3 split no digits"
    assert said in str(refusal.value)


def test_what_changes_no_number_may_change(bench, saved):
    free = (
        "tracker.project=another", "name=other", "trainer.save_steps=5", "trainer.save_total_limit=1",
        "keep_checkpoints=all", "trainer.dataloader_num_workers=2", "trainer.memory_budget=none",
        "trainer.cache=elsewhere", "data.num_proc=2",
    )  # fmt: skip
    config = compose(*[f"+{o}" if ".extra." in o else o for o in LONG], *free, f"model.id={bench.model}", "resume=it")
    check_same_run(asdict(config), saved, bench.preferences)


def test_a_reference_that_moves_is_in_no_checkpoint(bench, saved):
    moving = asdict(bench.config("trainer.engine=stock", "trainer.extra.sync_ref_model=true", "resume=it"))
    with pytest.raises(RequestError, match=r"resume=it: trainer\.extra\.sync_ref_model moves the reference"):
        check_same_run(moving, saved)


def test_it_is_refused_before_anything_is_loaded(bench, saved, monkeypatch):
    monkeypatch.setattr("smolvlm_exp.training.engine_setup.load_model", lambda *a: pytest.fail("the model was loaded"))
    run = saved.parent.parent
    with pytest.raises(RequestError, match=r"adapter\.r was 2 and is 4"):
        train(bench.config(f"resume={run}", "adapter.r=4"), run)


def test_what_is_allowed_and_cannot_be_is_one_error(bench, saved, tmp_path):
    trainer = bench.trainer(tmp_path, "adapter.r=4")
    with pytest.raises(RunError, match="does not fit this model: "):
        trainer.train(resume_from_checkpoint=str(saved))
