"""P7: out of memory is the same batch again in smaller parts: the same step, schedule, counters and random state."""

from dataclasses import replace

import pytest
import torch

from smolvlm_exp.engine.generation import answers
from tests.reliability.conftest import Bench, learnt, logged

STEPS = (
    "trainer.max_steps=3", "trainer.eval_strategy=no", "trainer.logging_steps=1", "trainer.save_strategy=no",
    "adapter.lora_dropout=0",
)  # fmt: skip
PARTS = ("entropy", "logits/", "token_accuracy")  # over the tokens of what TRL's loss code sees at once
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


def numbers(folder):
    return [{k: v for k, v in event.items() if not any(p in k for p in PARTS)} for event in logged(folder)]


@pytest.fixture(scope="module")
def whole(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    trainer = bench.run(folder, *STEPS)
    return folder, trainer, torch.get_rng_state()


@pytest.mark.parametrize("call", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 5, 6))])
def test_at_any_micro_batch(bench, whole, tmp_path, capsys, call):
    """Three steps of two micro-batches: memory runs out in the backward pass of each of them in turn."""
    folder, wanted, generator = whole
    calls = 0

    def prepare(trainer):
        backward = trainer.accelerator.backward

        def failing(loss, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                torch.rand(3)  # what a pass draws before it fails is not drawn twice
                raise ERRORS[call % len(ERRORS)]
            backward(loss, **kwargs)

        trainer.accelerator.backward = failing

    torch.manual_seed(0)
    trainer = bench.run(tmp_path, *STEPS, prepare=prepare)
    assert trainer.out_of_memory == 1
    assert "retrying this step and continuing with 1" in capsys.readouterr().out
    for mine, theirs in zip(numbers(tmp_path), numbers(folder), strict=True):
        if theirs["step"] <= 2:  # hardly anything has moved: which margin is above zero, rounding decides
            del mine["rewards/accuracies"], theirs["rewards/accuracies"]
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert [e["learning_rate"] for e in logged(tmp_path)] == [e["learning_rate"] for e in logged(folder)]
    assert [e["num_tokens"] for e in logged(tmp_path)] == [e["num_tokens"] for e in logged(folder)]
    for name, parameter in learnt(trainer).items():
        torch.testing.assert_close(parameter, learnt(wanted)[name], rtol=0, atol=1e-6)
    assert torch.get_rng_state().equal(generator)


def test_batches_that_a_loss_needs_whole(bench, tmp_path, capsys):
    """A last batch that is not full: three pairs in one pass are two passes then, of the two batches."""
    three = replace(bench.preferences, train=bench.preferences.train.select(range(3)))
    settings = (*STEPS, "trainer.max_steps=1", "trainer.loss_type=[sigmoid,sft]", "trainer.loss_weights=[1.0,1.0]")

    def failing(trainer):
        trainer.micro_batch, backward = 4, trainer.accelerator.backward

        def once(loss, **kwargs):
            trainer.accelerator.backward = backward
            raise ERRORS[0]

        trainer.accelerator.backward = once

    trainers = []
    for name, prepare in (("whole", None), ("failing", failing)):
        few = Bench(bench.processor, three, bench.cache, bench.model)
        trainers.append(few.run(tmp_path / name, *settings, prepare=prepare))
    assert "Out of memory at micro-batch 3: retrying this step and continuing with 2" in capsys.readouterr().out
    for wanted, found in zip(*(learnt(trainer).values() for trainer in trainers), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_image_features(bench, tmp_path, monkeypatch, capsys):
    """They are computed once, before the first step, many tiles at a time; their tower may find less memory."""
    compute, sizes = answers.image_features, []

    def failing(core, tiles):
        sizes.append(len(tiles))
        if len(tiles) > 3:
            raise ERRORS[0]
        return compute(core, tiles)

    plain = bench.trainer(tmp_path)
    monkeypatch.setattr(answers, "image_features", failing)
    trainer = Bench(bench.processor, bench.preferences, tmp_path / "cache", bench.model).trainer(tmp_path)
    assert max(sizes) > 6
    assert "image tiles at once: retrying with" in capsys.readouterr().out
    torch.testing.assert_close(trainer.eval_rows.features[:], plain.eval_rows.features[:], rtol=0, atol=1e-6)
