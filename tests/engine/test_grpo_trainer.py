"""GRPO on the engine against stock TRL: the same answers and rewards give the same losses, gradients and metrics."""

import random
from functools import cache

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from smolvlm_exp.engine import grpo_trainer
from smolvlm_exp.engine.generation import answers as sampling
from smolvlm_exp.engine.grpo_trainer import Examples, SharedPrefixGRPOTrainer
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.trainers import attach_and_fuse
from smolvlm_exp.models.adapter import TARGETS
from tests.engine.test_trainers import Failing, compare_weights, data, processor, small_model, trained  # noqa: F401

END = "<end_of_utterance>"
CLOCKS = ("sampling_time", "step_time", "num_tokens")


def letters(prompts, completions, completion_ids, truth, **columns):
    """Of no meaning, but different from answer to answer, and nothing for one in seven."""
    return [None if sum(ids) % 7 == 0 else (sum(ids) % 11) / 10 for ids in completion_ids]


def length(prompts, completions, completion_ids, **columns):
    return [len(ids) / 10 for ids in completion_ids]


class Scripted:
    """Gives every prompt the same answers, whichever trainer asks; some are cut, some groups all alike."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        torch.manual_seed(self._step)  # TRL goes on to shuffle the answers
        end = self._tokenizer.convert_tokens_to_ids(END)
        drawn = random.Random(self._step)
        answers = []
        for i, _ in enumerate(prompt_ids):
            same = i // 4 == 1
            count = 3 if same else drawn.randint(1, 6)
            ids = [40 + j if same else drawn.randint(50, 200) for j in range(count)]
            answers.append(ids if count == 6 and not same else [*ids, end])
        return answers, None


class Stock(Scripted, GRPOTrainer): ...


class Engine(Scripted, SharedPrefixGRPOTrainer): ...


class Bench:
    def __init__(self, processor, data, folder):  # noqa: F811
        self.processor, self.data, self.folder = processor, data, folder
        self.start = trained(self.engine())
        self.trained_stock = cache(self.train_stock)

    def common(self, **changes):
        defaults = {
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_generations": 4, "max_steps": 2,
            "max_completion_length": 6, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.1, "bf16": False,
            "lr_scheduler_type": "constant", "eval_strategy": "no", "save_strategy": "no", "use_cpu": True,
            "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "seed": 3, "max_grad_norm": 0,
            "reward_weights": [1.0, 0.3], "disable_dropout": True,
        }  # fmt: skip
        args = GRPOConfig(output_dir=str(self.folder), **{**defaults, **changes})
        return {"args": args, "reward_funcs": [letters, length], "processing_class": self.processor}

    def adapter(self):
        return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["text"])

    def stock(self, **changes):
        columns = ["images", "prompt", "truth"]
        trainer = Stock(
            small_model(), train_dataset=self.data.train.select_columns(columns), peft_config=self.adapter(),
            **self.common(**changes),
        )  # fmt: skip
        trainer.eos_token_ids = [self.processor.tokenizer.convert_tokens_to_ids(END)]
        return trainer

    def train_stock(self, changes):
        """A trained stock trainer; of all micro-batches of the engine's it is the same."""
        trainer = self.stock(**dict(changes))
        trainer.train()
        return trainer

    def engine(self, micro_batch=None, kind=Engine, **changes):
        common = self.common(**changes)
        model = attach_and_fuse(small_model().to(common["args"].device), self.adapter(), common["args"])
        examples = Examples(self.data.train.select_columns(["prompt", "truth"]), None)
        rows = PackedDataset(self.data.train, self.processor)
        trainer = kind(model, examples=examples, rows=rows, eval_rows=None, **common)
        trainer.micro_batch = micro_batch or trainer.micro_batch
        return trainer


@pytest.fixture(scope="module")
def bench(processor, data, tmp_path_factory):  # noqa: F811
    return Bench(processor, data, tmp_path_factory.mktemp("grpo"))


EVERY_LOSS = ("dapo", "dr_grpo", "grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
SCORED = ("entropy", "kl", "clip_ratio", "cispo_clip_ratio", "vespo")  # over what was scored alone


@pytest.mark.parametrize("loss_type", EVERY_LOSS)
def test_a_step_equals_stock_trls(bench, loss_type):
    same(bench, loss_type=loss_type, beta=0.05, scale_rewards="none" if loss_type == "dr_grpo" else "group")


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.0},
        {"mask_truncated_completions": True},
        {"num_iterations": 2, "max_steps": 4},
        {"steps_per_generation": 6, "max_steps": 4, "beta": 0.1},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2, "max_steps": 3},
        {"temperature": 0.7, "multi_objective_aggregation": "normalize_then_sum"},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
        {"delta": 1.5, "epsilon_high": 0.28, "scale_rewards": "batch", "num_iterations": 2, "max_steps": 3},
    ],
    ids=lambda changes: " ".join(changes),
)
@pytest.mark.parametrize("micro_batch", [5, 12])
def test_settings_and_micro_batches_equal_stock_trls(bench, changes, micro_batch):
    same(bench, micro_batch, **changes)


@pytest.mark.gpu
def test_a_step_on_a_gpu_equals_stock_trls(bench):
    """Float32: its kernels, and a prompt's keys for many answers."""
    same(bench, use_cpu=False, beta=0.05, tolerance=1e-4)


def same(bench, micro_batch=None, tolerance=1e-5, **changes):
    stock, engine = bench.trained_stock(tuple(changes.items())), bench.engine(micro_batch, **changes)
    engine.train()
    wanted, found = trained(stock), trained(engine)
    moved = sum((p.cpu() - bench.start[name]).abs().max() for name, p in wanted.items())
    assert moved > 1e-3
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=tolerance, atol=tolerance)
    compare_events(engine, stock, tolerance)


def compare_events(trainer, other, tolerance=1e-5):
    """Every logged number but clocks, and means over what was scored alone."""
    for mine, theirs in zip(trainer.state.log_history, other.state.log_history, strict=True):
        for key, value in theirs.items():
            if key.startswith(SCORED) or key in CLOCKS or "runtime" in key or "per_second" in key or "flos" in key:
                continue
            assert mine[key] == pytest.approx(value, abs=tolerance, rel=tolerance), key


@pytest.mark.parametrize(
    ("changes", "calls", "left"),
    [
        ({}, [2], 4),  # the second step's only pass, over the eight answers that teach
        ({}, [1, 2], 2),
        ({"num_iterations": 2, "beta": 0.05}, [1], 6),  # all twelve
    ],
    ids=str,
)
def test_running_out_of_memory_in_a_step_is_the_same_step(bench, capsys, changes, calls, left):
    """All answers in one pass at first: again in smaller parts, with the same losses and weights."""
    plain, failing = (bench.engine(12, mask_truncated_completions=False, **changes) for _ in range(2))
    failing.accelerator.backward = Failing(failing.accelerator.backward, calls, after=True)
    plain.train()
    failing.train()
    assert (failing.micro_batch, failing.out_of_memory) == (left, len(calls))
    assert capsys.readouterr().out.count("retrying this step and continuing with") == len(calls)
    compare_events(failing, plain)
    compare_weights(trained(failing), trained(plain))


@pytest.mark.parametrize(
    ("micro_batch", "loss_type", "words"),
    [
        (1, "dr_grpo", r"a single answer of at most 6 tokens, to row \d+"),
        (4, "bnpo", "4 answers, which this loss needs"),
    ],
)
def test_running_out_of_memory_where_nothing_is_smaller(bench, micro_batch, loss_type, words):
    trainer = bench.engine(micro_batch, loss_type=loss_type)
    trainer.accelerator.backward = Failing(trainer.accelerator.backward, [1])
    with pytest.raises(RuntimeError, match=f"Out of memory with {words}"):
        trainer.train()


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("sampling", "while sampling answers: trying again, 4 at a time"),
        ("sampling a group", "while sampling 4 answers to a prompt: trying again with half of them"),
        ("old log-probabilities", "continuing with 6"),
        ("joining batches", "continuing with 6"),
    ],
)
def test_running_out_of_memory_before_a_step_changes_nothing(bench, monkeypatch, capsys, where, told):
    """Answers are drawn, or scored as they were drawn, in smaller parts; they are the same answers."""
    changes = {"kind": SharedPrefixGRPOTrainer, "num_iterations": 2, "mask_truncated_completions": False}
    plain, failing = (bench.engine(12, **changes) for _ in range(2))
    plain.train()
    if where.startswith("sampling"):
        monkeypatch.setattr(sampling, "sample", Failing(sampling.sample, [1, 2] if "group" in where else [1]))
    elif where == "joining batches":
        monkeypatch.setattr(grpo_trainer, "joined", Failing(grpo_trainer.joined, [1]))
    else:
        failing.score = Failing(failing.score, [1])
    failing.train()
    assert told in capsys.readouterr().out
    compare_events(failing, plain)
    compare_weights(trained(failing), trained(plain))
    assert all((p != 0).any() for p in trained(plain).values())
