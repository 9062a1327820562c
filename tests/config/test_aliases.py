"""Other projects' names of settings lead to ours."""

import re

import pytest

from smolvlm_exp import main
from smolvlm_exp.config.aliases import MEANT, NAMES, setting_meant
from smolvlm_exp.config.schema import every_key
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose


def test_what_is_meant_exists():
    groups = {"trainer", "adapter", "quant", "data", "tracker", "resume", "name", "seed"}
    outside = {"CUDA_VISIBLE_DEVICES in the environment", "HF_TOKEN in the environment"}
    outside.add("accelerate launch --num_processes N -m smolvlm_exp")
    for meant in NAMES:
        for key in re.findall(r"[a-z_]+\.[a-z_]+(?=\W|$)", meant):
            assert key in every_key() or key == "hydra.run", (meant, key)
        assert "." in meant.split(",")[0] or meant.split(",")[0] in groups | outside


def test_other_names_are_no_settings_of_ours():
    ours = {key.rpartition(".")[2] for key in every_key()}
    # right behind their group's name
    elsewhere = {"r", "algorithm", "project", "precision", "load_in_4bit", "image_size", "weight_decay"} & MEANT.keys()
    assert MEANT.keys() & ours == elsewhere
    assert len(MEANT) >= 70


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("lr=1e-4", "lr: no such setting. Here it is trainer.learning_rate."),
        ("trainer.epochs=2", "trainer.epochs: no such setting. Here it is trainer.num_train_epochs."),
        ("lora_r=8", "lora_r: no such setting. Here it is adapter.r."),
        ("wandb=true", "wandb: no such setting. Did you mean tracker.wandb?"),
        ("zzz=8", "zzz: no such setting."),
        ("data=coco data.folder=x", "data.folder belongs to data=amber|files."),
        ("trainer=sft trainer.beta=1", "trainer.beta belongs to trainer=dpo|grpo."),
    ],
)
def test_an_other_name_is_answered_with_ours(typed, said):
    with pytest.raises(RequestError) as error:
        compose(*typed.split())
    assert str(error.value) == said


TYPED = {  # what people type -> the setting that it means
    "lr": "trainer.learning_rate", "learningrate": "trainer.learning_rate", "trainer.lr": "trainer.learning_rate",
    "epochs": "trainer.num_train_epochs", "num_epochs": "trainer.num_train_epochs", "steps": "trainer.max_steps",
    "batch_size": "trainer.per_device_train_batch_size", "batchsize": "trainer.per_device_train_batch_size",
    "bs": "trainer.per_device_train_batch_size", "ga": "trainer.gradient_accumulation_steps",
    "grad_accum": "trainer.gradient_accumulation_steps", "eval_steps": "trainer.eval_steps",
    "save_steps": "trainer.save_steps", "weight_decay": "trainer.weight_decay", "wd": "trainer.weight_decay",
    "warmup_ratio": "trainer.warmup_steps", "scheduler": "trainer.lr_scheduler_type", "optimizer": "trainer.optim",
    "adam_beta2": "trainer.extra", "bf16": "model.dtype", "fp16": "model.dtype", "torch_dtype": "model.dtype",
    "model_name_or_path": "model.id", "model.name": "model.id", "device": "CUDA_VISIBLE_DEVICES",
    "num_gpus": "accelerate launch", "rank": "adapter.r", "lora_r": "adapter.r", "adapter.rank": "adapter.r",
    "alpha": "adapter.lora_alpha", "target_modules": "adapter.target", "load_in_4bit": "quant",
    "output_dir": "hydra.run.dir", "run_name": "name", "wandb": "tracker.wandb", "report_to": "tracker",
    "resume_from_checkpoint": "resume", "max_seq_length": "data.max_length", "max_samples": "data.train",
    "dataset": "data", "data.path": "data", "image_size": "model.longest_edge", "task.run": "run",
}  # fmt: skip


@pytest.mark.parametrize("typed", TYPED)
def test_what_people_type_points_at_the_right_setting(typed):
    said = setting_meant(typed, every_key())
    assert re.match(rf"(Here it is|Did you mean) {re.escape(TYPED[typed])}\b(?!\.[a-z])", said), said


@pytest.mark.parametrize("typed", ["max_prompt_length", "tracker.colour", "task.wide", "do_train", "gamma", "data.x"])
def test_no_suggestion_beats_a_wrong_one(typed):
    assert setting_meant(typed, every_key()) == ""


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("trainer.learning_rate = 1e-4", "no spaces around the = sign: type trainer.learning_rate=1e-4"),
        ("trainer.learning_rate= 1e-4", "no spaces around the = sign: type trainer.learning_rate=1e-4"),
        ("model=tiny trainer.learning_rate =1e-4", "no spaces around the = sign: type trainer.learning_rate=1e-4"),
        ("run last", "no spaces around the = sign: type run=last"),
        ("adapter.r=4,", "adapter.r=4,: it ends in a comma: type adapter.r=4"),
        ("data.train=train[:6%]", "type 'data.train=\"train[:6%]\"'"),
        ("task=compare runs=last", "runs=last: type a list, 'runs=[last]'"),
        ("--resume last", "--resume: settings are typed without dashes, as resume=last."),
        ("--resume=last", "--resume: settings are typed without dashes, as resume=last."),
        (
            "adapter.r=4 --lr 1e-4 model=tiny",
            "--lr: settings are typed without dashes, as lr=1e-4. Here it is trainer.",
        ),
        ("-v", "unrecognized arguments: -v. Settings are typed without dashes"),
        ("--cfg", "argument --cfg/-c: expected one argument."),
        ("--help traner", "--help traner: no such group. Did you mean trainer?"),
    ],
)
def test_grammar_errors_in_words(monkeypatch, capsys, typed, said):
    monkeypatch.setattr("sys.argv", ["smolvlm_exp", *typed.split()])
    with pytest.raises(SystemExit) as ended:
        main.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error
    assert len(error.splitlines()) == 1


def test_flags_may_stand_between_settings(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["smolvlm_exp", "adapter.r=4", "--cfg", "job", "seed=3", "--package", "adapter"])
    main.main()
    assert "r: 4" in capsys.readouterr().out


def test_help_of_a_group(monkeypatch, capsys):
    """With the values that the default, or the option named, has."""

    def told(*words):
        monkeypatch.setattr("sys.argv", ["smolvlm_exp", *words])
        main.main()
        return capsys.readouterr().out

    adapter = told("--help", "adapter")
    assert adapter.startswith("adapter=dora lora none pissa rslora\n")
    assert "adapter.r=8   (int)\n" in adapter
    assert "adapter.use_dora=true   (bool)\n    a magnitude learned apart from the direction" in adapter
    assert "adapter.use_dora=false" in told("adapter=lora", "--help")
    assert "task.image_size=" in told("--help", "task=plan")
    general = told("-h", "general")
    assert "seed=0   (int)\n    of adapter initialisation" in general
    assert "adapter.r" not in general


def test_nothing_is_guessed_where_nothing_is_near():
    assert setting_meant("frobnicate", every_key()) == ""
    assert setting_meant("trainer.learning_rat", every_key()) == "Did you mean trainer.learning_rate? "
