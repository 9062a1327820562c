"""trainer.engine=shared through the pipeline: against stock TRL, what it caches, and what it refuses."""

from types import SimpleNamespace

import pytest

from smolvlm_exp.tasks.train import train
from smolvlm_exp.training.engine_setup import check_model, load_trainable_model
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import SIGMOID, compose, read_lines

CLOCKS = ("second", "memory", "runtime", "data_wait", "total_flos")


def events(folder):
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in event.items() if not any(c in k for c in CLOCKS)} for event in lines]


@pytest.mark.parametrize(
    "setting",
    [
        ["trainer=dpo"],
        pytest.param(["trainer=mpo"], marks=pytest.mark.slow),
        pytest.param(["trainer=sft"], marks=pytest.mark.slow),
        pytest.param(["adapter=pissa", *SIGMOID], marks=pytest.mark.slow),
        pytest.param(["adapter=none", *SIGMOID], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_both_engines_write_the_same_numbers(quick, tmp_path, request, setting):
    if setting != ["trainer=dpo"]:
        request.getfixturevalue("unseen")
    summaries = {}
    for engine in ("shared", "stock"):
        (tmp_path / engine).mkdir()
        common = ["quant=none", "trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.learning_rate=1e-4"]
        summaries[engine] = train(quick(f"trainer.engine={engine}", *common, *setting), tmp_path / engine)
    pairs = list(zip(*(events(tmp_path / engine) for engine in summaries), strict=True))
    for shared, stock in pairs:
        if shared["step"] == 1:  # policy and reference are one still, and ties fall either way
            shared.pop("rewards/accuracies", None), stock.pop("rewards/accuracies", None)
        assert shared == pytest.approx(stock, rel=2e-4, abs=2e-4)
    assert any("eval_loss" in shared for shared, _ in pairs)
    assert summaries["shared"]["after"] == pytest.approx(summaries["stock"]["after"], abs=1e-3)


@pytest.mark.usefixtures("unseen")
def test_features_are_cached_where_the_vision_tower_is_frozen_and_tiles_elsewhere(quick, tmp_path, capsys):
    step = ("trainer.max_steps=1", "trainer.eval_strategy=no")
    settings = {
        "adapter.target=text": "features",
        "adapter.target=recipe": "tiles",
        "trainer.keep_features=false": "tiles",
    }
    for number, (setting, cached) in enumerate(settings.items()):
        train(quick(*step, setting, f"trainer.cache={tmp_path}/{number}"), tmp_path)
        out = capsys.readouterr().out
        assert [kind for kind in ("features", "tiles") if f"{kind} of 4 images" in out] == [cached]
        assert "training reads 4 of 16 rows, and only these are prepared" in out


@pytest.mark.usefixtures("unseen")
def test_a_later_run_reads_the_reference_from_the_cache(quick, tmp_path, capsys):
    common = ("data.scene_seed=77", "trainer.max_steps=1", "+trainer.extra.data_seed=0")
    train(quick(*common), tmp_path)
    assert "reference: 4 rows, 4 of them computed" in capsys.readouterr().out
    train(quick(*common, "adapter.r=2", "trainer.learning_rate=1e-5", "seed=4"), tmp_path)
    assert "reference: 4 rows, 0 of them computed" in capsys.readouterr().out


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ("adapter.target=text", ["features"]),  # of the held-out rows
        ("adapter.target=recipe", ["tiles"]),
        ("trainer=sft", ["features"]),
        ("trainer.cache_ram=0MiB", ["features", "features", "reference"]),
        ("trainer.max_steps=9", ["features", "features", "reference"]),  # into a second epoch
        ("adapter=pissa quant=none", ["features", "features", "reference"]),  # no reference once it moves
    ],
)  # fmt: skip
def test_what_is_read_once_and_does_not_fit_is_computed_by_the_steps(quick, tmp_path, setting, kept, capsys):
    common = ("trainer.eval_strategy=no", "trainer.max_steps=2", "trainer.cache_ram=0.1MiB", *setting.split())
    small = train(quick(*common, f"trainer.cache={tmp_path}/small"), tmp_path / "a")
    live = "is more than trainer.cache_ram; computed with every batch" in capsys.readouterr().out
    entries = [path.name.split("-")[0] for path in (tmp_path / "small").glob("[!.]*-*")]
    assert sorted(entries) == kept
    assert live == (len(kept) == 1)
    if live:
        large = train(quick(*common, "trainer.cache_ram=1GiB", f"trainer.cache={tmp_path}/large"), tmp_path / "b")
        assert small["after"] == pytest.approx(large["after"], abs=1e-4)
        for mine, theirs in zip(events(tmp_path / "a"), events(tmp_path / "b"), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)


@pytest.mark.usefixtures("unseen")
def test_effects_of_8_bit_layers_and_dropout_are_logged(quick, tmp_path, capsys):
    dropout = ("adapter.lora_dropout=0.1", "trainer.disable_dropout=false")
    train(quick("quant=int8", *dropout, "trainer.max_steps=1"), tmp_path)
    out = capsys.readouterr().out
    assert "reference: recomputed per batch" in out
    assert "both answers of a pair share the dropout mask on their prompt" in out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["model.attn_implementation=eager"], r"attn_implementation=eager needs trainer\.engine=stock"),
        (["+trainer.extra.sync_ref_model=true"], r"trainer\.extra\.sync_ref_model needs trainer\.engine=stock"),
        (["+trainer.extra.neftune_noise_alpha=5"], r"neftune_noise_alpha needs trainer\.engine=stock"),
        (["trainer.keep_features=true", "trainer.engine=stock"], r"keep_features=true needs trainer\.engine=shared"),
        (["trainer.keep_features=true", "adapter.target=recipe"], r"reaches model\.vision_model.*\n.*target=text"),
        (["trainer.keep_features=true", "adapter=none", "quant=none"], r"adapter=none trains the vision tower too"),
        (["trainer.keep_features=true", "+adapter.extra.bias=all", "quant=none"], r"without adapter\.extra\.bias"),
        (["adapter.r=1000000"], r"adapter\.r=1000000: [\d,]+ weights and their gradients in float32 take \d+\.\d GiB"),
        (["adapter=pissa", "quant=none", "model.adapter=a"], r"adapter=pissa starts from the base's singular vectors"),
        (["adapter=pissa", "quant=none", "adapter.r=500"], r"adapter\.r=500: PiSSA takes r singular vectors"),
        (["model.weights=random", "model.shape.hidden_size=1000000"], r"model\.shape: its weights take \d+\.\d GiB"),
        (["model.weights=random", "model.shape.hidden_size=63"], r"model\.shape: .*\(63\) is not a multiple"),
        (["adapter.target=.*lm_head"], r"linear layer, only lm_head: .*\+adapter\.extra\.modules_to_save=\[lm_head\]"),
        (["adapter.target=.*embed_tokens"], r"\+adapter\.extra\.modules_to_save=\[embed_tokens\]"),
        (["trainer.cache_ram=4"], r"trainer\.cache_ram=4 is not a size; write it as 8GiB"),
        (["trainer.cache_disk=many"], r"trainer\.cache_disk=many is not a size"),
    ],
    ids=str,
)
def test_settings_that_exclude_each_other_are_refused(quick, tmp_path, setting, message):
    with pytest.raises(RequestError, match=message):
        train(quick(*setting), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.usefixtures("unseen")
def test_eager_attention_on_the_stock_engine(quick, tmp_path):
    eager = quick("model.attn_implementation=eager", "trainer.engine=stock", "trainer.max_steps=1")
    assert train(eager, tmp_path)["status"] == "done"


def test_a_model_split_over_devices_is_refused():
    config, stock = compose("model.device_map=balanced"), compose("trainer.engine=stock")
    split = SimpleNamespace(hf_device_map={"model.text_model": 0, "lm_head": 1})
    with pytest.raises(RequestError, match=r"splits the model over 2 devices, .* model\.device_map=auto"):
        check_model(config.trainer, config.adapter, split)
    check_model(stock.trainer, stock.adapter, split)
    split.hf_device_map = {"": 1}
    check_model(config.trainer, config.adapter, split)


def test_what_a_rank_or_a_target_asks_for_in_vain_is_told(quick, capsys):
    config = quick("adapter.r=200", "adapter.target='.*layers.0.*q_proj|.*patch_embedding'", "quant=none")
    load_trainable_model(config.trainer, config.model, config.quant, config.adapter, 0)
    out = capsys.readouterr().out
    assert "adapter: r=200 is above the rank of " in out
    assert "patch_embedding: no adapter fits there" in out
    assert "modules_to_save=[patch_embedding]" in out
