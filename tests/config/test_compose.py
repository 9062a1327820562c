"""The command line: what it refuses, how fast it answers, and that every option composes."""

import os
import re
import resource
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from smolvlm_exp.config.compose import check_command, check_shape
from smolvlm_exp.config.previous_run import complete_overrides
from smolvlm_exp.config.schema import Config
from smolvlm_exp.rewards.build import BUILDERS
from smolvlm_exp.tasks.command import complete_and_check
from smolvlm_exp.tasks.compare import read_run
from smolvlm_exp.tasks.train import train
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.paths import CONF
from tests.conftest import compose

GROUPS = ("task", "model", "quant", "adapter", "data", "trainer", "tracker", "reward")
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))

MISTAKES = {
    ("adapter.rr=4",): ("adapter.rr", "Did you mean adapter.r?"),
    ("+adapter.lora_alfa=4",): ("adapter.lora_alfa", "Did you mean adapter.lora_alpha?"),
    ("learning_rate=1e-4",): ("learning_rate", "Did you mean trainer.learning_rate?"),
    ("adaptr=dora",): ("adaptr", "Did you mean adapter?"),
    ("adapter=dorra",): ("adapter=dorra", "Did you mean dora? Known: dora, lora, none, pissa, rslora."),
    ("task=eval",): ("task=eval", "Did you mean evaluate?"),
    ("model=you/name",): ("model=you/name", "A name of the Hub is typed as model=smolvlm model.id=you/name."),
    ("data=.",): ("data=.", "A folder is typed as data=files data.folder=.."),
    ("adapter.r=many",): ("adapter.r", "could not be converted to Integer"),
    ("adapter.r=0",): ("adapter.r=0", "1 is the least"),
    ("trainer.learning_rate=0",): ("trainer.learning_rate=0", "greater than 0"),
    ("trainer.learning_rate=inf",): ("trainer.learning_rate=inf", "must be a finite number"),
    ("trainer.beta=nan",): ("trainer.beta=nan", "must be a finite number"),
    ("trainer.loss_weights=[1,.inf]",): ("trainer.loss_weights", ""),
    ("+trainer.extra.adam_beta1=nan",): ("trainer.extra.adam_beta1=nan", "must be a finite number"),
    ("task=evaluate", "task.temperature=nan"): ("task.temperature=nan", "must be a finite number"),
    ("adapter.lora_dropout=1.5",): ("adapter.lora_dropout=1.5 is too large", "1 is the most"),
    ("task=serve", "serve.port=70000"): ("serve.port=70000 is too large", "65535 is the most"),
    ("seed=-1",): ("seed=-1 is too small", "0 is the least"),
    ("seed=4294967296",): ("seed=4294967296 is too large", ""),
    ("task.max_new_tokens=1000000000",): ("task.max_new_tokens=1000000000 is too large", ""),
    ("+trainer.extra.learning_rate=0.5",): ("trainer.extra.learning_rate: set trainer.learning_rate instead", ""),
    ("+trainer.extra.max_steps=1",): ("trainer.extra.max_steps: set trainer.max_steps instead", ""),
    ("+trainer.extra.seed=1",): ("trainer.extra.seed: set seed instead", ""),
    ("+trainer.extra.output_dir=a",): ("trainer.extra.output_dir: set hydra.run.dir instead", ""),
    ("+trainer.extra.bf16=true",): ("trainer.extra.bf16: set model.dtype instead", ""),
    ("+trainer.extra.max_length=9",): ("trainer.extra.max_length: set data.max_length instead", ""),
    ("+trainer.extra.report_to=tensorboard",): ("trainer.extra.report_to: set tracker instead", ""),
    ("+trainer.extra.push_to_hub=true",): ("trainer.extra.push_to_hub: set export.push_to_hub instead", ""),
    ("+adapter.extra.r=4",): ("adapter.extra.r: set adapter.r instead", ""),
    ("+adapter.extra.target_modules=[q_proj]",): ("adapter.extra.target_modules: set adapter.target instead", ""),
    ("+model.extra.dtype=float32",): ("model.extra.dtype: set model.dtype instead", ""),
    ("+model.extra.load_in_4bit=true",): ("model.extra.load_in_4bit: set quant instead", ""),
    ("data.on_bad_row=ignore",): ("data.on_bad_row=ignore", "Known: error, skip."),
    ("trainer.extra.seed_=1",): ("trainer.extra.seed_", "+trainer.extra.seed_=1"),
    ("trainer.loss_type=[sgmoid]",): ("trainer.loss_type=sgmoid", "Did you mean sigmoid?"),
    ("--config-dir", "nowhere"): ("--config-dir nowhere", "no such folder"),
    ("data=files",): ("data.folder", "has no value yet"),
    ("data.source=os",): ("data.source=os", "no such module"),
    ("adapter.r=4,8",): ("adapter.r=4,8", "add -m"),
    ("-m", "adapter.r=4,x"): ("adapter.r", "could not be converted to Integer"),
    ("-m", "adapter=lora,dorra"): ("adapter=dorra", "Did you mean dora?"),
    ("resume=last",): ("resume=last", "no run under outputs/"),
    ("resume=",): ("resume= is empty", "name a folder, or `last`"),
    ("task=evaluate", "run="): ("run= is empty", "name a folder, or `last`"),
    ("data.num_proc=0",): ("data.num_proc=0", "1 is the least"),
    ("data.max_length=0",): ("data.max_length=0", "1 is the least"),
    ("data.train_rows=1000000000",): ("data.train_rows=1000000000 is too large", ""),
    ("sweep=last",): ("sweep=...", "add -m"),
    ("-m", "sweep=last"): ("sweep=last", "no sweep under outputs/"),
    ("-m", "sweep=nowhere"): ("sweep=nowhere", "no sweep.json"),
    ("metric=after.chair",): ("metric=after.chair", "Did you mean after.chair_s?"),
    ("keep=all",): ("keep is now keep_checkpoints", ""),
    ("task=chat", "session.keep=1GiB"): ("session.keep is now session.cache", ""),
    ("model.shape.longest_edge=64",): ("model.shape.longest_edge is now model.longest_edge", ""),
    ("model.shape.hidden_size=64",): ("model.shape.hidden_size: model.weights=pretrained", "add model.weights=random"),
    ("task=plan", "model.shape.image_size=384"): ("model.shape.image_size: model.weights=pretrained", ""),
    ("task=export", "export.merge=dequantised"): ("export.merge=dequantised is now export.merge=dequantized", ""),
    ("export.search=true",): ("export.search belongs to task=export", "this is task=train"),
    ("task.card=rtx4060",): ("task.card belongs to task=plan", "this is task=train"),
    ("task=plan", "task.matmul_tflops=165"): ("task.matmul_tflops is now task.card", ""),
    ("task=chat", "task.max_new_tokens=3"): ("belongs to task=train|evaluate|generate|export", ""),
    ("task=evaluate", "session.cache=2GiB"): ("session.cache belongs to task=chat|serve", ""),
    ("reward=truht",): ("reward=truht", "Did you mean truth?"),
    ("reward.wieghts=1",): ("reward.wieghts: no such setting", "Did you mean reward.weights?"),
    ("reward.weights.length=1",): ("reward.weights.length", "+reward.weights.length=1"),
    ("reward.length.buffer=0",): ("reward.length.buffer=0", "1 is the least"),
    ("task=chat", "reward=objects"): ("reward.weights belongs to task=train|evaluate", "this is task=chat"),
    ("task=export", "reward.user=a.py:f"): ("reward.user belongs to task=train|evaluate", "this is task=export"),
    ("experiment=sweep_rank_lr_ga",): ("adapter.r, trainer.learning_rate", "add -m"),
    ("hydra.mode=MULTIRUN",): ("hydra.mode=MULTIRUN", "by -m"),
    ("-m", "experiment=search_rank_lr_beta", "hydra.sweeper.n_trails=3"): ("hydra.sweeper.n_trails", "no such setting"),
    ("-m", "adapter.r=interval(4,8)"): ("adapter.r=interval(4,8)", "hydra/sweeper=search"),
    ("--config-path", "nowhere"): ("--config-path", "nowhere: there is no such folder"),
    ("adapter.r=",): ("adapter.r", ""),
    ("x=[",): ("x=[", ""),
    ("=3",): ("'' is not the name of a setting", ""),
    ("seed", "=", "3"): ("seed = 3: no spaces around the = sign: type seed=3", ""),
    ("seed =3",): ("seed =3: a setting is typed as key=value, without spaces around the = sign", ""),
    ("name=2024_01",): ("name=2024_01: it would be read as the number 202401", "'name=\"2024_01\"'"),
    ("model.revision=12e345678",): ("it would be read as the number inf", "'model.revision=\"12e345678\"'"),
    ("trainer.loss_type=sigmoid",): ("type a list, 'trainer.loss_type=[sigmoid]'", ""),
    ("trainer.loss_type=sigmoid,sft",): ("add -m", "type a list, 'trainer.loss_type=[sigmoid,sft]'"),
    ("-m", "trainer.loss_type=[sigmoid],sft"): ("trainer.loss_type=[sigmoid],sft: type a list", ""),
    ("adapter.target=[q_proj,v_proj]",): ("a regular expression", "'adapter.target=\".*(q_proj|v_proj)\"'"),
    ("adapter.target=q_proj,v_proj",): ("add -m", "'adapter.target=\".*(q_proj|v_proj)\"'"),
}


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """The answer to a command that cannot work, typed in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def answer(*typed: str) -> str:
        with pytest.raises(RequestError) as refused:
            complete_and_check(get_args_parser().parse_args(typed))
        assert len(str(refused.value).splitlines()) <= 3
        return str(refused.value)

    return answer


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_refused_before_any_work(refusal, tmp_path, arguments):
    answer = refusal(*arguments)
    for part in MISTAKES[arguments]:
        assert part in answer
    assert not list(tmp_path.iterdir()), "nothing was started"


ODD_TEXTS = (
    "~/pairs", "=été", "my (pairs)", "a=b", "it's", "#", ".*(a|b)", "train[:0]", "a&b;c", 'the "best"', "it's \"x\"",
    "日本", "a=\\", "{a}",
)  # fmt: skip


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_that_wants_quotes_is_refused_with_what_works_in_a_shell(refusal, text):
    shown = refusal("data=files", f"data.folder={text}").partition(", so type ")[2]
    (argument,) = shlex.split(shown)
    assert compose("data=files", argument).data.folder == os.path.expanduser(text)


def test_texts_in_a_list_are_quoted_one_by_one(refusal):
    (argument,) = shlex.split(refusal("task=compare", "runs=[outputs/r=8,a]").partition(", so type ")[2])
    assert compose("task=compare", argument).runs == ["outputs/r=8", "a"]


@pytest.mark.parametrize(
    ("file", "text", "key", "fix"),
    [
        ("adapter/mine.yaml", "r: 4\nlora_alfa: 8\n", "adapter.lora_alfa", "Did you mean adapter.lora_alpha?"),
        (
            "experiment/own.yaml",
            "# @package _global_\ntrainer: {bta: 0.1}\n",
            "trainer.bta",
            "Did you mean trainer.beta?",
        ),
        ("adapter/mine.yaml", "r: many\n", "r", "could not be converted to Integer"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(refusal, tmp_path, file, text, key, fix):
    path = tmp_path / "mine" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    answer = refusal("--config-dir", "mine", f"{Path(file).parent}={Path(file).stem}")
    for part in (file, key, fix):
        assert part in answer


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["adapter.rr=4"], "Did you mean adapter.r?"),
        (["adapter=pissa", "tracker=none"], "quant=none"),
        (["-m", "hydra/sweeper=search"], "hydra.sweeper.params"),
    ],
    ids=["before composing", "by the task", "by the sweeper"],
)
def test_a_refused_command_has_no_traceback_and_exit_code_2(command, arguments, fix):
    done = command(*arguments)
    assert done.returncode == 2
    assert fix in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.attn_implementation=flash_attention_2"], "there is no CUDA device"),
        (["adapter=pissa"], "quant=none"),
        (["adapter=none"], "quant=none"),
        (["adapter.target=nothing_like_it"], "matches no linear layer"),
        (["quant=none", "quant.bnb_4bit_quant_type=nf4"], "has no effect without quant.load_in_4bit=true"),
        (["model.id=no/such-model"], "model.weights=random"),
        (["model.dtype=float12"], "is not a torch dtype"),
        (["trainer.loss_type=[sigmoid]"], "same length as `loss_type`"),
        (["+trainer.extra.no_such_argument=1"], "no_such_argument"),
        (["+adapter.extra.no_such_argument=1"], "no_such_argument"),
    ],
)
def test_impossible_settings_are_refused_before_the_first_evaluation(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("smolvlm_exp.tasks.result.evaluate", lambda *a, **k: pytest.fail("work was started"))
    with pytest.raises(RequestError, match=message):
        train(compose("data.train_rows=4", "data.test_rows=4", "tracker=none", *arguments), tmp_path)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_and_cfg_answer_within_two_seconds(command, arguments):
    command(*arguments, fresh=True)  # the first call of all compiles the package
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # other tests may be running
    done = command(*arguments, fresh=True)
    assert done.returncode == 0
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 2


def test_help_lists_every_option(command):
    text = command("--help").stdout
    for group in (*GROUPS, "experiment"):
        line = next(line for line in text.splitlines() if line.split()[:1] == [group])
        assert set(line.split()[1:]) == {path.stem for path in (CONF / group).glob("*.yaml")}
    assert text.count("python -m smolvlm_exp") >= 5


def test_the_shell_completes_options(command):
    line = "smolvlm-exp adapter=d"
    done = command("-sc", "query=bash", env={"COMP_LINE": line, "COMP_POINT": str(len(line))})
    assert done.stdout.split() == ["adapter=dora"]


def test_cfg_includes_defaults_of_the_schema(command):
    shown = yaml.safe_load(command("--cfg", "job", "adapter=lora", "seed=3").stdout)
    assert shown["seed"] == 3
    assert shown["adapter"]["use_dora"] is False
    assert shown["model"]["weights"] == "pretrained"  # not in any YAML file: the schema's default


NEEDED = {
    "files": ["folder"], "hub": ["id"], "mmpr": ["annotations", "images"], "pope": ["questions", "images"],
    "amber": ["folder", "images"], "coco": ["annotations", "images"],
}  # fmt: skip
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option, monkeypatch):
    monkeypatch.setattr("smolvlm_exp.reporting.trackers.config.find_spec", lambda name: True)
    needed = [f"data.{key}=x" for key in NEEDED.get(option, ())]
    assert getattr(compose(f"{group}={option}", *needed), group) is not None
    text = (CONF / group / f"{option}.yaml").read_text()
    assert "python -m" in text or text[0] == "#"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_begins_with_its_command(experiment):
    head = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()[:2]
    many = "-m " if experiment.startswith(("sweep", "search")) else ""
    compose(f"experiment={experiment}", multirun=bool(many))
    assert head[0] == "# @package _global_"
    assert head[1].startswith(f"# python -m smolvlm_exp {many}experiment={experiment}")


def test_the_cookbook_experiment_has_the_published_values():
    config = compose("experiment=cookbook")
    published = {
        "adapter": {"r": 8, "lora_alpha": 8, "lora_dropout": 0.1, "use_dora": True, "init_lora_weights": "gaussian"},
        "data": {"train": "train[:6%]", "test": "test[:1%]", "max_edge": 512, "max_length": None},  # not 1024
        "quant": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "trainer": {
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 32, "num_train_epochs": 5,
            "logging_steps": 10, "eval_strategy": "steps", "save_strategy": "steps", "gradient_checkpointing": True,
        },
    }  # fmt: skip
    assert config.adapter.target == "recipe"
    for group, values in published.items():
        assert {key: getattr(getattr(config, group), key) for key in values} == values


def old_run(folder: Path, *overrides: str) -> Path:
    """A folder as a run of an earlier release left it: all tasks' settings, under their old names."""
    config = OmegaConf.create(asdict(compose(*overrides)))
    config.task.update({"picture": "512x384", "answers": None, "temperature": 0.0, "rows": None})
    config.keep, config.session.keep = config.pop("keep_checkpoints"), config.session.pop("cache")
    config.export.merge = "dequantised"
    config.tracker = {"type": "none", "project": None, "entity": None, "tags": []}
    OmegaConf.update(config, "model.shape.longest_edge", 64)
    for new in ("longest_edge", "image_splitting", "upscale"):
        config.model.pop(new)
    (folder / ".hydra").mkdir(parents=True)
    (folder / "adapter").mkdir()
    (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-2" / "manifest.json").write_text("{}")
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    choices = {"config_sources": [], "choices": {"trainer": "dpo", "tuned": "tiny_dpo"}}
    OmegaConf.save({"hydra": {"runtime": choices}}, folder / ".hydra" / "hydra.yaml")
    typed = ["trainer=dpo", "keep=all", "task.matmul_tflops=3", "export.search=true", "seed=3", *overrides]
    OmegaConf.save([*typed, "model.shape.longest_edge=64"], folder / ".hydra" / "overrides.yaml")
    return folder


def checked(*typed: str) -> Config:
    """The configuration of a command, completed by the run that it names."""
    args = get_args_parser().parse_args(typed)
    args.overrides = complete_overrides(args.overrides, args.multirun)
    return check_command(args)[0]


def test_a_run_of_an_earlier_release_can_be_replayed_resumed_and_evaluated(tmp_path):
    folder = old_run(tmp_path / "old")
    replay = f"--config-path={folder}/.hydra"
    replayed = checked("seed=1", replay)
    assert (replayed.seed, replayed.tracker.chosen) == (1, [])
    assert (replayed.keep_checkpoints, replayed.session.cache, replayed.export.merge) == ("best", "1GiB", "dequantized")
    assert replayed.trainer.loss_type == ["sigmoid", "sft"]
    with pytest.raises(RequestError, match=r"export\.search belongs to task=export"):
        checked("export.search=true", replay)
    resumed = checked(f"resume={folder}", "tracker=none")
    assert (resumed.keep_checkpoints, resumed.seed, resumed.export.search) == ("all", 3, False)
    assert resumed.trainer.loss_type == ["sigmoid", "sft"]
    own = old_run(tmp_path / "own", "model.longest_edge=128")
    for typed in ([f"resume={own}"], ["task=export", f"run={own}"], ["task=plan", f"run={own}"]):
        assert checked(*typed).model.longest_edge == 128
    assert checked("task=export", f"run={folder}").export.search
    assert not checked("task=evaluate", f"run={folder}").export.search
    assert read_run(folder).settings["session.cache"] == "1GiB"


def test_a_run_in_a_folder_of_any_name_is_resumed_and_evaluated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    old_run(tmp_path / "it's (r=8) é")
    for name in (f"{tmp_path}/it's (r=8) é", "~/it's (r=8) é", f'"{tmp_path}/it\'s (r=8) é"'):
        assert checked(f"resume={name}", "tracker=none").resume == f"{tmp_path}/it's (r=8) é"
        assert checked("task=evaluate", f"run={name}").model.adapter == f"{tmp_path}/it's (r=8) é/adapter"


def test_the_shape_of_an_earlier_release_s_run_counts_where_its_weights_were_random(tmp_path):
    for weights, longest_edge in (("pretrained", None), ("random", 64)):
        folder = old_run(tmp_path / weights, f"model.weights={weights}")
        for typed in ([f"--config-path={folder}/.hydra"], [f"resume={folder}"], ["task=evaluate", f"run={folder}"]):
            assert checked(*typed).model.longest_edge == longest_edge
    small = old_run(tmp_path / "small", "model.weights=random", "model.shape.hidden_size=64")
    (small / "adapter").rename(small / "model")
    tuned = checked("task=evaluate", f"run={small}").model  # its folder has dimensions of its own
    assert (tuned.id, tuned.weights, tuned.longest_edge) == (f"{small}/model", "pretrained", 64)


def test_rewards_replace_and_add_to_the_default_s():
    truth = yaml.safe_load((CONF / "reward" / "truth.yaml").read_text())["weights"]
    assert compose().reward.weights == compose("task=chat").reward.weights == truth
    assert compose("reward=yes_no").reward.weights == {"yes_no": 1.0}
    assert compose("+reward.weights.length=0.1").reward.weights == {**truth, "length": 0.1}
    assert "repetition" not in compose("~reward.weights.repetition").reward.weights
    for option in (CONF / "reward").glob("*.yaml"):
        assert compose(f"reward={option.stem}").reward.weights.keys() <= BUILDERS.keys()


def test_several_rewards_of_one_s_own_are_a_sweep():
    args = get_args_parser().parse_args(["-m", "reward.user='my dir/a.py:f','b.py:g'"])
    assert [config.reward.user for config in check_command(args)] == ["my dir/a.py:f", "b.py:g"]


@pytest.mark.parametrize(
    ("saved", "setting"),
    [
        ("reward.user=mine.py:short", "reward.user=mine.py:short"),
        ("reward.judge={url: 'http://a/v1'}", "reward.judge.url=http://a/v1"),
    ],
)
def test_what_a_saved_run_names_is_typed_again(tmp_path, saved, setting):
    folder = old_run(tmp_path / "old", setting)
    path = folder / ".hydra" / "overrides.yaml"
    path.write_text(
        yaml.safe_dump([saved if override == setting else override for override in yaml.safe_load(path.read_text())])
    )
    for typed in ([f"resume={folder}"], ["task=evaluate", f"run={folder}"]):
        with pytest.raises(RequestError, match=re.escape(f"type {setting} (or {setting.partition('=')[0]}=null)")):
            checked(*typed)
        checked(*typed, setting)
        if saved == setting:
            checked(*typed, f"{setting.partition('=')[0]}=null")
    checked("task=plan", f"run={folder}")


def test_an_experiment_s_shape_is_refused_for_pretrained_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("smolvlm_exp.config.compose.CONF", tmp_path)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "fast.yaml").write_text("model:\n  shape:\n    hidden_size: 64\n")
    composed = OmegaConf.create({"hydra": {"runtime": {"choices": {"experiment": "fast", "model": "tiny"}}}})
    with pytest.raises(RequestError, match=r"conf/experiment/fast\.yaml: model\.shape: .*add model\.weights=random"):
        check_shape(composed, set())


def test_a_user_s_trainer_option_keeps_its_values(tmp_path):
    """Ours have the embedded model's values; one that starts from ours has them where it sets none."""
    (tmp_path / "trainer").mkdir()
    for base, steps, batch in (("/schema/trainer@_here_: dpo", -1, 1), ("dpo", 110, 16)):
        own = f"defaults:\n  - {base}\n\nalgorithm: dpo\nlearning_rate: 3.0e-4\n"
        (tmp_path / "trainer" / "mine.yaml").write_text(own)
        trainer = checked("trainer=mine", f"--config-dir={tmp_path}").trainer
        assert (trainer.learning_rate, trainer.max_steps, trainer.per_device_train_batch_size) == (3e-4, steps, batch)
    tuned = yaml.safe_load((CONF / "tuned" / "tiny.yaml").read_text())
    for option in ("rpo", "dpo", "ipo", "hinge", "robust", "apo_zero", "mpo"):
        ours = asdict(compose(f"trainer={option}").trainer)
        assert {key: ours[key] for key in tuned} == tuned
    assert compose("trainer=sft").trainer.max_steps == 80
    assert compose("trainer=dpo").trainer.loss_type == ["sigmoid"]
    assert compose().trainer == compose("trainer=rpo").trainer
    assert compose("model=smolvlm").trainer == compose("model=smolvlm", "trainer=dpo").trainer


def test_an_own_option_by_a_shipped_name_is_refused(tmp_path):
    """Hydra would take the shipped one without a word."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "fast.yaml").write_text("# @package _global_\nseed: 7\n")
    args = get_args_parser().parse_args(["--config-dir", str(tmp_path), "experiment=fast"])
    with pytest.raises(RequestError, match=r"experiment/fast\.yaml has the name of an option .*my_fast\.yaml"):
        check_command(args)
