"""GRPO (arXiv 2402.03300) on the engine: TRL's GRPOTrainer, with its sampling and its log-probabilities replaced.

Rewards, advantages, losses and metrics are TRL's own code. Answers come from the engine's sampler, which reads a prompt
once for its whole group; log-probabilities from packed passes, in which a group shares its prompt and image.

An answer whose advantage is zero has no gradient, unless a KL term or an entropy bonus gives it one, so it is not
scored, nor are truncated answers that are masked. `entropy`, `kl` and `clip_ratio/*` are means over what was scored.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import datasets
import torch
from torch import nn
from trl import GRPOTrainer

from smolvlm_exp.engine.generation.answers import sample_answers
from smolvlm_exp.engine.generation.sampler import Answer, Prompt
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.engine.group_trainer import Batch, GroupTrainer
from smolvlm_exp.engine.step_trainer import overridden
from smolvlm_exp.utils.distributed import no_gather
from smolvlm_exp.utils.phases import phase

IMAGE_DEPENDENCE = "image_dependence"  # the reward that asks the model
SUMMED = ("dapo", "cispo", "vespo")  # TRL divides their sums by the step's tokens; other losses are means over answers
SEEDS = 2**20  # of answers of one generation; generations of one seed


@dataclass
class Examples:
    """What reward functions see of rows: `prompt` (messages) and columns such as `truth`."""

    train: datasets.Dataset
    test: datasets.Dataset | None


class SharedPrefixGRPOTrainer(GroupTrainer, GRPOTrainer):
    """See the module's text."""

    reward_func_names: list[str]
    num_generations: int
    max_completion_length: int
    top_k: int
    args: Any

    def __init__(self, model: Any, *, examples: Examples, **kwargs: Any) -> None:
        """As StepTrainer; `examples`: of the same rows."""
        self.examples = examples
        self.units: list[Batch] = []
        args = kwargs["args"]
        with overridden(args, beta=0.0):  # else TRL would put a second, frozen adapter on the model for the reference
            super().__init__(model, **kwargs)
        self.beta = args.beta
        self.planned = [size for size in (self.num_generations >> i for i in range(8)) if size]
        end = self._tokenizer.eos_token_id
        self.eos_token_ids = [end, *(token for token in self.eos_token_ids if token != end)]
        self.batch_loss = (
            self.loss_type == "bnpo" or self.top_entropy_quantile < 1 or self._entropy_bonus_enabled
        )  # each depends on what else is in the batch

    def statistics(self) -> tuple[str, ...]:
        return "log_probs", "entropy"

    # Sampling

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        """TRL's, of rows that come as their numbers."""
        self.features.clear()
        self.sampled = [example["row"] for example in inputs]
        examples = self.examples.train if self.model.training else self.examples.test  # type: ignore[union-attr]
        assert examples is not None
        distinct = {row: {**examples[row], "row": row} for row in dict.fromkeys(self.sampled)}
        output: Batch = super()._generate_and_score_completions([distinct[row] for row in self.sampled])
        return {**output, "rows": torch.tensor(self.sampled), "generation": torch.tensor(self._step)}

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.current_rows.prompt_ids(row).tolist() for row in self.sampled], None, {}

    @phase("sampling")
    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, *_: Any
    ) -> tuple[list[list[int]], None]:
        """Token ids of every answer, the end token included where it came."""
        start = time.perf_counter()
        groups = self.sampled[::num_generations]
        assert self.sampled == [row for row in groups for _ in range(num_generations)], "a group in parts"
        training = self.model.training  # type: ignore[union-attr]
        model = self.accelerator.unwrap_model(self.model)
        prompts = [
            Prompt(self.current_rows.prompt_ids(row), partial(self.features_of, row) if self.has_images(row) else None)
            for row in groups
        ]
        answers = sample_answers(model, self.processing_class, prompts, self.sampling(), num_generations)
        if training:
            self._metrics["train"]["sampling_time"].append(time.perf_counter() - start)
        return [self.with_end(answer) for group in answers for answer in group], None

    def sampling(self) -> Sampling:
        """How this generation's answers are drawn; their seeds depend on the run's, the step and their place alone."""
        generation = self.args.seed * SEEDS + 2 * self._step + (not self.model.training)  # type: ignore[union-attr]
        return Sampling(
            self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=generation * SEEDS + self.args.process_index * len(self.sampled),
            suppress=(self.rows.image_token_id,),
        )

    def with_end(self, answer: Answer) -> list[int]:
        return [*answer.ids, *self.eos_token_ids[:1]] if answer.ended else answer.ids

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """TRL's; `image_dependence` is given the columns that it needs."""
        if IMAGE_DEPENDENCE in self.reward_func_names:
            logps, blank = (self.mean_logps(completion_ids_list, blank) for blank in (False, True))
            inputs = [
                {**example, "logps": own, "blank_logps": other}
                for example, own, other in zip(inputs, logps, blank, strict=True)
            ]
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return rewards

    # Steps

    def step_of(self, inputs: Any) -> list[Batch] | None:
        """Batches of `per_device_train_batch_size` answers, as TRL has shuffled and split them."""
        self.model.train()  # type: ignore[union-attr]
        self.units.append(self._prepare_inputs(inputs))
        self._step += 1
        if len(self.units) < self.current_gradient_accumulation_steps:
            return None
        units, self.units = self.units, []
        return units

    def run(self, model: nn.Module, step: list[Batch], num_items_in_batch: Any) -> torch.Tensor:
        start, total = time.perf_counter(), torch.zeros((), device=self.args.device)
        for batch, weight in self.micro_batches(step):
            self.running = batch["rows"].tolist()
            with self.compute_loss_context_manager(), no_gather(self.accelerator):
                loss = weight * self._compute_loss(model, batch)
            if loss.requires_grad:
                self.accelerator.backward(loss)
            total += loss.detach()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:  # no answer taught: the optimiser's momentum goes on
                parameter.grad = torch.zeros_like(parameter)
        self._metrics["train"]["step_time"].append(time.perf_counter() - start)
        return total

    def micro_batches(self, units: list[Batch]) -> list[tuple[Batch, float]]:
        """A step's answers, those to one prompt together where they fit, and the weight of each micro-batch's loss."""
        if self.batch_loss:
            return [(unit, 1.0) for unit in units]
        batches = []
        for _, group in groupby(units, key=lambda unit: int(unit["generation"])):
            own = list(group)
            per_unit = len(own[0]["rows"])
            step = joined(own)
            self.sampled = step["rows"].tolist()
            teaching = step["completion_mask"].any(1)
            if not self.beta:
                teaching = teaching & (step["advantages"] != 0)
            taught = teaching.nonzero().flatten().tolist() or [0]  # one, so that TRL has something to log
            for part in self.parts(taught, self.micro_batch):
                weight = 1.0 if self.loss_type in SUMMED else len(part) / per_unit
                batches.append((selected(step, part), weight))
        return batches

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> torch.Tensor:
        self.sampled = inputs["rows"].tolist()
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.average_metrics("train" if self.model.training else "eval")  # type: ignore[union-attr]
        super().log(logs, start_time)


def joined(units: Sequence[Batch]) -> Batch:
    """Batches of one generation as one; what belongs to the generation alone stays as it is."""
    return {
        name: torch.cat([unit[name] for unit in units]) if value.dim() else value
        for name, value in units[0].items()
        if value is not None
    }


def selected(batch: Batch, answers: Sequence[int]) -> Batch:
    """Some answers of a batch, by their places."""
    return {name: value[list(answers)] if value.dim() else value for name, value in batch.items()}
