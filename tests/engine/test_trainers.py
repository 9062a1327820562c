"""Training on the engine against stock TRL: same rows, same order, same losses, gradients and metrics."""

import math
import multiprocessing
from copy import deepcopy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import BatchSampler
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.engine.deferred_metrics import DeferredMetrics, flush_metrics
from smolvlm_exp.engine.disk_cache import DiskCache
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.inputs.micro_batches import split_micro_batches, step_rows
from smolvlm_exp.engine.layers import fuse, gpu_attention, graphs, ops
from smolvlm_exp.engine.layers.dora import exact_dora
from smolvlm_exp.engine.model_parts import core_of
from smolvlm_exp.engine.precompute.features import keep_features
from smolvlm_exp.engine.trainers import SharedPrefixDPOTrainer, SharedPrefixSFTTrainer, attach_and_fuse
from smolvlm_exp.models.adapter import TARGETS
from smolvlm_exp.models.model import load_processor
from smolvlm_exp.models.shape import shape_of
from smolvlm_exp.training.sft import completions
from tests.conftest import compose
from tests.engine.stock import DPO, Loss, random_model
from tests.engine.test_forward import EVERY_LOSS

CONFIG = compose("data.train_rows=24", "data.test_rows=6")
CLOCKS = ("runtime", "per_second", "total_flos")
TOKEN_MEANS = ("entropy", "logits/", "token_accuracy")  # over the tokens of what TRL's loss code sees at once


def small_model():
    """A copy of `random_small`, before an adapter that is the same each time."""
    torch.manual_seed(0)
    return deepcopy(random_small())


@cache
def random_small():
    """The embedded model's shape for its processor, in a few layers with random weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vision_num_hidden_layers": 1,
             "vision_hidden_size": 32, "vision_intermediate_size": 48}  # fmt: skip
    return random_model(replace(shape_of("tiny"), **sizes))


@pytest.fixture(scope="module")
def processor():
    return load_processor(CONFIG.model)


@pytest.fixture(scope="module")
def data(processor, tmp_path_factory):
    return load_preferences(CONFIG.data, processor, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bench(processor, data, tmp_path_factory):
    return Bench(processor, data, tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def sft_history(bench):
    return history(bench.stock_sft())


class Bench:
    """Trainers of either kind with the same arguments."""

    def __init__(self, processor, data, folder):
        self.processor, self.data, self.folder = processor, data, folder
        self.stock_history, self.shared_history = (
            cache(lambda build=build, **changes: history(build(**changes))) for build in (self.stock, self.shared)
        )

    def arguments(self, kind, **changes):
        defaults = {
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4,
            "max_steps": 4, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.2, "lr_scheduler_type": "constant",
            "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "gradient_checkpointing": False,
            "bf16": False, "use_cpu": True, "report_to": "none", "max_length": None, "disable_tqdm": True, "seed": 3,
        }  # fmt: skip
        if kind is SFTConfig:
            defaults["completion_only_loss"] = True
        return kind(output_dir=str(self.folder), **{**defaults, **changes})

    def adapter(self, target="text", **lora):
        if target == "none":
            return None
        return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[target], **lora})

    def rows(self, rows):
        return self.data.train if rows is None else self.data.train.select(range(rows))

    def stock(self, adapter=("text",), rows=None, **changes):
        target, *options = adapter
        return DPOTrainer(
            small_model(), small_model() if target == "none" else None,
            args=self.arguments(DPOConfig, **changes), train_dataset=self.rows(rows), eval_dataset=self.data.test,
            processing_class=self.processor, peft_config=self.adapter(target, **dict(options)),
        )  # fmt: skip

    def stock_sft(self, **changes):
        return SFTTrainer(
            small_model(), self.arguments(SFTConfig, **changes),
            train_dataset=completions(self.data.train), eval_dataset=completions(self.data.test),
            processing_class=self.processor, peft_config=self.adapter(),
        )  # fmt: skip

    def shared(self, adapter=("text",), rows=None, micro_batch=None, model=None, **changes):
        trainer = self.engine(SharedPrefixDPOTrainer, DPOConfig, adapter, rows, model, micro_batch, **changes)
        trainer.score_references(DiskCache(self.folder / "cache", 0))
        return trainer

    def shared_sft(self, adapter=("text",), model=None, micro_batch=None, **changes):
        return self.engine(SharedPrefixSFTTrainer, SFTConfig, adapter, None, model, micro_batch, **changes)

    def engine(self, trainer_class, arguments, adapter, rows, model, micro_batch, **changes):
        target, *options = adapter
        splits = [PackedDataset(split, self.processor) for split in (self.rows(rows), self.data.test)]
        train, test = [s.chosen_only() for s in splits] if trainer_class is SharedPrefixSFTTrainer else splits
        args = self.arguments(arguments, **changes)
        model = attach_and_fuse(model or small_model(), self.adapter(target, **dict(options)), args)
        trainer = trainer_class(model, rows=train, eval_rows=test, args=args, processing_class=self.processor)
        trainer.micro_batch = micro_batch or trainer.micro_batch
        return trainer


def history(trainer):
    """Train; what was logged, and the trained weights."""
    trainer.train()
    return trainer.state.log_history, trained(trainer)


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def compare(history, wanted, without=(), tolerance=1e-5):
    """Every event with every number, except clocks and what `without` names."""
    assert len(history) == len(wanted)
    for mine, theirs in zip(history, wanted, strict=True):
        ties = ("rewards/accuracies",) if mine["step"] == 1 else ()  # policy and reference are still one
        left_out = (*CLOCKS, *ties, *without)
        mine, theirs = ({k: v for k, v in e.items() if not any(o in k for o in left_out)} for e in (mine, theirs))
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def compare_weights(weights, wanted, tolerance=1e-5):
    for name, theirs in wanted.items():
        torch.testing.assert_close(weights[name], theirs, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def train_and_compare(trainer, wanted, without=(), tolerance=1e-5):
    """Train; every logged number and every trained weight is as in another trainer's history."""
    events, weights = history(trainer)
    compare(events, wanted[0], without, tolerance)
    compare_weights(weights, wanted[1], tolerance)


def losses(events):
    return [event["loss"] for event in events if "loss" in event]


@pytest.mark.parametrize(
    "adapter",
    [("text",), ("recipe", ("use_dora", True)), ("all",), ("text", ("bias", "lora_only")), ("none",)],
    ids=str,
)
def test_every_logged_number_is_stocks(bench, adapter):
    changes = {"adapter": adapter, "learning_rate": 1e-3 if adapter == ("none",) else 0.2}
    trainer = bench.shared(**changes)
    assert trainer.ref_model is None
    assert not [name for name, _ in trainer.model.named_parameters() if ".ref." in name]  # TRL's second adapter
    train_and_compare(trainer, bench.stock_history(**changes))


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_any_micro_batch_is_the_same_step(bench, micro_batch):
    train_and_compare(bench.shared(micro_batch=micro_batch), bench.stock_history(), TOKEN_MEANS)


def test_a_last_step_that_is_not_full(bench):
    """11 rows in groups of 4 over two epochs."""
    few = {"rows": 11, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 6}
    train_and_compare(bench.shared(micro_batch=2, **few), bench.stock_history(**few), TOKEN_MEANS)


def test_a_last_batch_that_is_not_full_counts_by_its_pairs(bench):
    """14 rows: the second step has six pairs, which stock TRL weights alike in threes of two, not in [4, 2]."""
    changes = {"rows": 14, "max_steps": 2, "eval_strategy": "no"}
    wanted, weights = bench.stock_history(per_device_train_batch_size=2, gradient_accumulation_steps=4, **changes)
    events, mine = history(bench.shared(per_device_train_batch_size=4, gradient_accumulation_steps=2, **changes))
    assert losses(events) == pytest.approx(losses(wanted), rel=1e-5)
    compare_weights(mine, weights)


@pytest.mark.parametrize(
    ("loss", "micro_batch"), [(("sft",), 6), (("aot",), 3), (("aot",), 9), (("sigmoid", "sft"), 6)], ids=str
)
def test_losses_that_need_their_complete_batch(bench, loss, micro_batch):
    """They see the loader's batches, whatever goes through the model together: metrics are equal too."""
    changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_steps": 2, "loss_type": loss}
    wanted = bench.stock_history(**changes)
    train_and_compare(bench.shared(micro_batch=micro_batch, **changes), wanted)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"max_steps": 2}, 8),
        ({"max_steps": -1, "num_train_epochs": 0.5}, 12),
        ({"rows": 11, "max_steps": 5, "dataloader_drop_last": True}, 11),  # the second epoch leaves out another row
        ({"rows": 11, "max_steps": 9}, 11),
    ],
    ids=str,
)
def test_the_rows_ahead_are_those_that_steps_read(bench, changes, count):
    """Of all others the images are forgotten, and no number changes."""
    changes |= {"eval_strategy": "no"}
    trainer = bench.shared(**changes)
    ahead = trainer.rows_ahead()
    assert len(ahead) == count
    trainer.rows.keep_only(ahead)
    batch, read = trainer.rows.batch, set()
    trainer.rows.batch = lambda numbers: read.update(numbers) or batch(numbers)
    trainer.batches = trainer.make_loader()
    train_and_compare(trainer, bench.shared_history(**changes), tolerance=0)
    assert sorted(read) == ahead


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rows_of_a_step_in_one_of_two_processes(rank):
    sampler = SeedableRandomSampler(range(14), data_seed=3)
    batches = BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), 2, rank)
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        units = list(batches)
        expected += [units[0] + units[1] + units[2], units[3]]
    sampler.set_epoch(0)
    loader = SimpleNamespace(batch_sampler=batches)
    assert list(step_rows(loader, 3, range(1, 5))) == expected
    assert list(step_rows(loader, 3, [4])) == expected[3:]
    assert sampler.epoch == 0


def test_checkpointing_workers_and_accumulated_logs(bench):
    changes = {"gradient_checkpointing": True, "logging_steps": 3, "max_steps": 6, "rows": 12}  # two epochs
    trainer = bench.shared(dataloader_num_workers=2, **changes)
    train_and_compare(trainer, bench.stock_history(**changes), ("rewards/accuracies",))  # the first step's ties
    assert not multiprocessing.active_children()


def test_a_frozen_vision_tower_gets_no_gradient_with_checkpointing(bench):
    """Stock TRL's does: it makes every embedding's output require one."""
    needed = {}
    for name in ("shared", "stock"):
        trainer = getattr(bench, name)(gradient_checkpointing=True, max_steps=1, rows=8, eval_strategy="no")
        layer, needed[name] = core_of(trainer.model).vision_model.encoder.layers[-1], []
        layer.register_forward_hook(
            lambda module, given, made, own=needed[name]: own.append((torch.is_grad_enabled(), made.requires_grad))
        )
        trainer.train()
    assert needed["shared"]
    assert not any(gradient for _, gradient in needed["shared"])
    assert (True, True) in needed["stock"]


def test_resuming_from_a_checkpoint_continues_exactly(bench, tmp_path):
    changes = {"rows": 10, "save_strategy": "steps", "save_steps": 4, "max_steps": 7}  # it stops within an epoch
    first, second = bench.shared(**changes), bench.shared(**changes)
    first.args.output_dir = str(tmp_path)
    events, weights = history(first)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(second.state.log_history)[-3:] == losses(events)[-3:]
    compare_weights(trained(second), weights, tolerance=0)


class Failing:
    """Runs out of memory at the calls whose numbers it is given."""

    def __init__(self, function, calls, after=False, error=None):
        self.function, self.calls, self.after = function, set(calls), after
        self.error = error or torch.OutOfMemoryError("CUDA out of memory.")
        self.count = 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        fails = self.count in self.calls
        if fails and not self.after:
            raise self.error
        result = self.function(*args, **kwargs)
        if fails:
            raise self.error
        return result


@pytest.mark.parametrize("where", ["forward", "backward", "after the backward pass"])
def test_running_out_of_memory_changes_nothing(bench, where, capsys):
    """Five steps of eight pairs; the third fails, its second attempt too."""
    changes = {"gradient_accumulation_steps": 4, "max_steps": 5, "eval_strategy": "no"}
    wanted = bench.shared_history(micro_batch=4, **changes)
    trainer = bench.shared(micro_batch=4, **changes)
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    failing = {"calls": (6, 8), "after": where.startswith("after"), "error": error}
    if where == "forward":
        trainer.score = Failing(trainer.score, **failing)
    else:
        trainer.accelerator.backward = Failing(trainer.accelerator.backward, **failing)
    train_and_compare(trainer, wanted, TOKEN_MEANS, tolerance=1e-6)
    out = capsys.readouterr().out
    assert "Out of memory at micro-batch 4: retrying this step and continuing with 2" in out
    assert "Out of memory at micro-batch 2: retrying this step and continuing with 1" in out
    assert trainer.micro_batch == 1
    assert trainer.eval_micro_batch == 4


@pytest.mark.parametrize(
    ("changes", "call", "error", "message"),
    [
        ({"micro_batch": 1}, 2, None, r"with a single pair, row \d+: \d+ tokens, \d+ tiles\.\n.*quant=nf4"),
        ({"loss_type": ["sft"]}, 1, None, r"2 pairs, which this loss needs together.\nLower trainer.per_device"),
        ({}, 1, RuntimeError("something else"), "something else"),
    ],
)
def test_an_error_that_smaller_micro_batches_cannot_help(bench, changes, call, error, message):
    trainer = bench.shared(**changes)
    trainer.accelerator.backward = Failing(trainer.accelerator.backward, [call], error=error)
    with pytest.raises(RuntimeError, match=message):
        trainer.train()


def test_evaluation_has_its_own_micro_batch(bench, capsys):
    trainer = bench.shared()
    trainer.score = Failing(trainer.score, [5, 6])  # the first evaluation's first calls
    train_and_compare(trainer, bench.stock_history())
    assert "Out of memory evaluating 4 pairs at once: retrying and continuing with 2" in capsys.readouterr().out
    assert (trainer.micro_batch, trainer.eval_micro_batch) == (2, 1)


def test_out_of_memory_references_are_scored_in_parts(bench):
    trainer = bench.shared()
    wanted = trainer.rows.reference
    trainer.compute_ref_log_probs = Failing(trainer.compute_ref_log_probs, [1, 4])
    trainer.score_references(DiskCache(bench.folder / "cache", 0))
    assert trainer.eval_micro_batch == 1
    torch.testing.assert_close(trainer.rows.reference, wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_supervised_fine_tuning(bench, sft_history, micro_batch):
    trainer = bench.shared_sft(micro_batch=micro_batch)
    train_and_compare(trainer, sft_history, TOKEN_MEANS if micro_batch else ())
    assert losses(trainer.state.log_history) == pytest.approx(losses(sft_history[0]), rel=1e-6)


def test_adapters_on_quantised_weights_are_float32(bench):
    model = small_model()
    model.is_loaded_in_4bit = True  # all that TRL looks at
    weights = trained(bench.shared(model=model))
    assert all(parameter.dtype is torch.float32 for parameter in weights.values())
    compare_weights(weights, trained(bench.shared()), tolerance=0)


@pytest.mark.parametrize("engine", ["shared", "shared_sft"])
def test_a_fresh_dora_still_adds_nothing_once_trl_rounded_it(bench, engine):
    """PEFT takes the magnitude of a bfloat16 base in bfloat16; gains that are not 1 move the policy off its start."""
    model = small_model().bfloat16()
    model.is_loaded_in_4bit = True  # all that TRL looks at before it rounds
    trainer = getattr(bench, engine)(("text", ("use_dora", True)), model=model)
    layers = [layer for layer in trainer.model.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == 14
    for layer in layers:
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert magnitude.dtype is torch.float32
        assert torch.equal(magnitude / exact_dora(layer, "default").norm(), torch.ones_like(magnitude))


def test_micro_batches():
    units = [[0, 1, 2], [3, 4, 5], [6]]
    pairs = split_micro_batches(units, 2, batch_loss=False)
    assert [micro.segments for micro in pairs] == [[[0, 1]], [[2, 3]], [[4, 5]], [[6]]]
    assert [micro.shares[0] for micro in pairs] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1])
    assert [m.segments for m in split_micro_batches(units, 6, batch_loss=True)] == [[[0, 1, 2], [3, 4, 5]], [[6]]]
    assert [m.segments for m in split_micro_batches(units, 1, batch_loss=True)] == [[[0, 1, 2]], [[3, 4, 5]], [[6]]]


def test_numbers_stay_on_the_device_until_they_are_logged():
    values, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[True, False], [True, True]])
    with DeferredMetrics():
        total = values.sum().item()
        picked = values[mask]
        metrics = {"total": [total, total * 3], "mean": [picked.mean(), picked.sum()], "tokens": [mask.sum().item()]}
        assert torch.tensor(0.0)  # its value was not read
    assert isinstance(total, torch.Tensor)
    flush_metrics(metrics, [1.0, 3.0])
    assert metrics == {"total": [25.0], "mean": [pytest.approx((8 / 3 + 3 * 8) / 4)], "tokens": [3]}


@pytest.mark.parametrize("options", EVERY_LOSS, ids=str)
def test_losses_and_metrics_read_nothing_off_the_device(options):
    """On tensors without contents: whatever would wait for a number finds none."""
    with FakeTensorMode():
        mask = torch.ones(6, 9, dtype=torch.long)
        fields = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask,
                  "ref_chosen_logps": torch.ones(3), "ref_rejected_logps": torch.ones(3)}  # fmt: skip
        floats = {name: torch.ones(6, 8, requires_grad=True) for name in DPO if name != "is_top1"}
        outputs = FusedCausalLMOutput(**floats, is_top1=torch.ones(6, 8, dtype=torch.bool))
        loss = Loss(torch.nn.Identity(), **options)
        loss.trainer.model = lambda **_: outputs
        loss.trainer.model.training = True
        with DeferredMetrics():
            value, _ = loss(fields)
        value.backward()
        with pytest.raises(RuntimeError):
            loss(fields)


@pytest.mark.slow
@pytest.mark.parametrize("options", EVERY_LOSS, ids=str)
def test_twenty_steps_of_every_loss(bench, options):
    changes = {**options, "max_steps": 20, "eval_strategy": "no", "optim": "adamw_torch", "learning_rate": 1e-3}
    stock, trainer = bench.stock(**changes), bench.shared(**changes)
    stock.train()
    trainer.train()
    assert losses(trainer.state.log_history) == pytest.approx(losses(stock.state.log_history), abs=1e-4)
    assert all(map(math.isfinite, losses(trainer.state.log_history)))


@pytest.mark.gpu
@pytest.mark.parametrize("replays", [False, True])
def test_a_step_does_not_wait_for_the_device(bench, monkeypatch, replays):
    """Under autocast, too: these weights are float32."""
    monkeypatch.setattr(SharedPrefixDPOTrainer, "can_replay", replays)
    trainer = bench.shared(use_cpu=False, bf16=True, max_steps=3, logging_steps=3, eval_strategy="no")
    step = trainer.training_step

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error" if trainer.state.global_step else "default")  # not the first
        try:
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.training_step = watched
    trainer.train()
    assert trainer.state.global_step == 3


def scaled_losses(trainer, scaler):
    """The losses of a training by which they are scaled, and the scale that it ended with."""
    trainer.accelerator.scaler = scaler
    logged, _ = history(trainer)
    return losses(logged), scaler.get_scale()


def test_a_step_whose_gradients_exceed_the_dtype_runs_again_with_half_the_scale(bench):
    """Float32's own range in place of float16's; PyTorch would leave the first steps out."""
    expected, _ = bench.shared_history(eval_strategy="no")
    trainer, scaler = bench.shared(eval_strategy="no"), torch.amp.GradScaler("cpu", init_scale=2.0**126)
    clip = trainer.accelerator.clip_grad_norm_

    def unscaled(parameters, max_norm):  # accelerate's own, in float16
        scaler.unscale_(trainer.optimizer.optimizer)
        return clip(parameters, max_norm)

    trainer.accelerator.clip_grad_norm_ = unscaled
    found, scale = scaled_losses(trainer, scaler)
    assert found == pytest.approx(losses(expected), abs=1e-6)
    assert found[1] != found[0]
    assert 2.0**16 < scale < 2.0**126


def old_gpu(bench, monkeypatch, **changes):
    for module in (fuse, gpu_attention, ops):
        monkeypatch.setattr(module, "has", lambda part: False)
    return bench.shared(use_cpu=False, **changes)


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["text", "recipe"])
def test_without_triton_and_flash_attention_a_gpu_trains_alike(bench, monkeypatch, target):
    settings = {"adapter": (target, ("use_dora", True)), "eval_strategy": "no"}
    (expected, _), (found, _) = bench.stock_history(**settings), history(old_gpu(bench, monkeypatch, **settings))
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("target", "micro_batch"), [("text", 4), ("text", 2), ("text", 1), ("recipe", 2)])
def test_replayed_graphs_are_the_passes_that_were_captured(bench, monkeypatch, target, micro_batch):
    """Several shapes, several micro-batches a step, a larger shape after smaller ones, an evaluation in between."""
    settings = {"adapter": (target, ("use_dora", True), ("lora_alpha", 4)), "max_steps": 8, "eval_steps": 5}

    def training():
        trainer = bench.shared(use_cpu=False, micro_batch=micro_batch, **settings)
        if target == "text":
            cache = DiskCache(bench.folder / "cache", 0, 2**30)
            keep_features(trainer.rows, trainer.model, trainer.pixels, cache, 0)
        return history(trainer)

    passes = []
    monkeypatch.setattr(graphs.Replay, "backward", staticmethod(spied(graphs.Replay.backward, passes)))
    logged, weights = training()
    assert len(passes) == 8 * 4 // micro_batch - 1  # the first compiles the kernels
    monkeypatch.setattr(SharedPrefixDPOTrainer, "can_replay", False)
    wanted, wanted_weights = training()
    assert len(passes) == 8 * 4 // micro_batch - 1
    assert losses(logged) == pytest.approx(losses(wanted), abs=1e-6)
    for name, weight in wanted_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6)


def spied(function, calls):
    def wrapped(*args):
        calls.append(args)
        return function(*args)

    return wrapped


@pytest.mark.gpu
def test_in_float16_every_step_counts(bench, monkeypatch):
    expected, _ = bench.stock_history(eval_strategy="no")
    trainer = old_gpu(bench, monkeypatch, fp16=True, eval_strategy="no")
    found, scale = scaled_losses(trainer, torch.amp.GradScaler("cuda", init_scale=2.0**60))
    assert found == pytest.approx(losses(expected), abs=5e-3)
    assert found[1] != found[0]
    assert scale < 2.0**30
