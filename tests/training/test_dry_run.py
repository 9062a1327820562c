"""What upstream refuses is refused before the model is loaded, with the setting to blame."""

import os
import time

import pytest

from smolvlm_exp.tasks.train import train
from smolvlm_exp.training.dry_run import check_upstream
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import SIGMOID, compose

REFUSED = {
    ("trainer.lr_scheduler_type=cosine_with_min_lr",): "trainer.lr_scheduler_type=cosine_with_min_lr: One of min_lr or",
    ("trainer.lr_scheduler_type=warmup_stable_decay",): "trainer.lr_scheduler_type=warmup_stable_decay: ",
    ("trainer.lr_scheduler_type=foo",): "trainer.lr_scheduler_type=foo: foo is not a valid SchedulerType",
    ("+trainer.extra.lr_scheduler_kwargs={foo:1}",): "trainer.extra.lr_scheduler_kwargs={'foo': 1}: ",
    ("trainer.optim=galore_adamw",): "trainer.optim=galore_adamw: You need to install `galore_torch`",
    ("trainer.optim=apollo_adamw",): "trainer.optim=apollo_adamw: ",
    ("trainer.optim=schedule_free_adamw",): "trainer.optim=schedule_free_adamw: ",
    ("trainer.optim=lomo", "trainer=grpo"): "trainer.optim=lomo changes weights within the backward pass",
    ("trainer.optim=galore_adamw_layerwise",): "trainer.optim=galore_adamw_layerwise changes weights within",
    ("trainer.optim=grokadamw", "trainer=sft"): "trainer.optim=grokadamw: ",
    ("trainer.optim=adamw_torch_4bit", "trainer.engine=stock"): "trainer.optim=adamw_torch_4bit: ",
    ("+trainer.extra.accelerator_config={use_seedable_sampler: false}",): "trainer.extra.accelerator_config: ",
    ("+trainer.extra.save_only_model=true",): "trainer.extra.save_only_model: a run could not be resumed",
    ("+trainer.extra.ignore_data_skip=true",): "trainer.extra.ignore_data_skip: a run could not be resumed",
    ("+trainer.extra.adam_beta1=5",): "trainer.extra.adam_beta1=5: Invalid beta parameter",
    ("+trainer.extra.fsdp=full_shard",): "trainer.extra.fsdp=full_shard: Using fsdp only works in distributed",
    ("+trainer.extra.nonsense=1", "trainer.optim=foo"): "trainer.extra.nonsense=1: ",  # two mistakes: upstream's first
    ("trainer=sft", "+trainer.extra.loss_type=foo"): "trainer.extra.loss_type=foo: Invalid `loss_type` foo",
    ("trainer=robust", "trainer.label_smoothing=0.5"): "trainer.loss_type=['robust']: the loss is not finite",
    ("trainer.engine=stock", "+trainer.extra.precompute_ref_log_probs=true"):
        "trainer.extra.precompute_ref_log_probs=True: `precompute_ref_log_probs=True` is not supported for vision",
    ("trainer.loss_weights=[1]",): "trainer.loss_type=['sigmoid', 'sft']: `loss_weights` must have the same length",
    ("trainer.loss_type=[exo_pair]", "trainer.loss_weights=null"): "trainer.loss_type=['exo_pair']: Label smoothing",
    ("adapter.init_lora_weights=evaa",): "adapter.init_lora_weights=evaa: Unknown initialization",
    ("adapter.init_lora_weights=[1]",): "adapter.init_lora_weights=[1]: ",
    ("adapter.init_lora_weights=eva",): "adapter.init_lora_weights=eva starts from activations on the data",
    ("adapter.init_lora_weights=corda",): "adapter.init_lora_weights=corda starts from activations on the data",
    ("adapter.init_lora_weights=loftq",): "adapter.init_lora_weights=loftq: ",
    ("+adapter.extra.layer_replication=[[0,2],[1,3]]",): "adapter.extra.layer_replication=[[0, 2], [1, 3]]: ",
    ("+adapter.extra.inference_mode=true",): "adapter.extra.inference_mode=True: nothing would be trained",
}  # fmt: skip


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_the_setting_to_blame_is_named(overrides):
    config, environment = compose(*overrides), dict(os.environ)
    with pytest.raises(RequestError) as refused:
        check_upstream(config.trainer, config.adapter, config.model.dtype)
    assert str(refused.value).startswith(REFUSED[overrides])
    assert "\n" not in str(refused.value)
    assert dict(os.environ) == environment


@pytest.mark.parametrize(
    "overrides",
    [
        (), ("trainer=sft",), ("trainer=grpo",), ("trainer=mpo",), ("trainer=robust",), ("trainer.engine=stock",),
        ("trainer.engine=stock", "trainer=sft"), ("trainer.engine=stock", "trainer=sft", "adapter=none", "quant=none"),
        ("trainer.engine=stock", "adapter=none", "quant=none", "+trainer.extra.sync_ref_model=true"),
        ("adapter=none", "quant=none"), ("adapter=pissa", "quant=none"), ("adapter=rslora", "adapter.r=512"),
        ("trainer.use_weighting=true", "trainer.ld_alpha=0.5", *SIGMOID), ("trainer.optim=adamw_bnb_8bit",),
        ("trainer.lr_scheduler_type=reduce_lr_on_plateau", "trainer.eval_strategy=steps"),
        ("trainer.lr_scheduler_type=cosine_with_min_lr", "+trainer.extra.lr_scheduler_kwargs={min_lr:1e-6}"),
        ("+adapter.extra.layers_to_transform=[5]", "+adapter.extra.rank_pattern={q_proj:64}"),
        ("adapter.target=.*layers.5.*k_proj", "+adapter.extra.modules_to_save=[lm_head]"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_works_passes_in_a_fraction_of_a_second(overrides):
    config = compose(*overrides)
    start = time.perf_counter()
    check_upstream(config.trainer, config.adapter, config.model.dtype)
    assert time.perf_counter() - start < 2  # 0.1 to 0.2 s where nothing else runs


def test_it_comes_before_the_model(quick, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("smolvlm_exp.tasks.train.load_processor", lambda *args: loaded.append(1))
    with pytest.raises(RequestError, match=r"trainer\.optim=galore_adamw"):
        train(quick("trainer.optim=galore_adamw"), tmp_path)
    assert not loaded
    assert not list(tmp_path.iterdir())
