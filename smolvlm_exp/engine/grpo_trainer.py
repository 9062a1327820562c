"""GRPO (arXiv 2402.03300) on the engine: TRL's GRPOTrainer, with its sampling and its log-probabilities replaced.

Rewards, advantages, losses and metrics are TRL's own code. Answers come from the engine's sampler, which reads a prompt
once for its whole group; log-probabilities from packed passes, in which a group shares its prompt and image.

An answer whose advantage is zero has no gradient, unless a KL term or an entropy bonus gives it one, so it is not
scored, nor are truncated answers that are masked. `entropy`, `kl` and `clip_ratio/*` are means over what was scored.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from trl import GRPOTrainer

from smolvlm_exp.engine.generation.answers import END, sample_answers, tile_features
from smolvlm_exp.engine.generation.sampler import Answer, Prompt
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.inputs.packing import pack_answers
from smolvlm_exp.engine.memory.probe import out_of_memory
from smolvlm_exp.engine.model_parts import core_of, is_trainable
from smolvlm_exp.engine.step_trainer import StepTrainer, overridden
from smolvlm_exp.utils.distributed import no_gather
from smolvlm_exp.utils.phases import phase

Batch = dict[str, Any]  # TRL's: `rows` (N,) and the other tensors of N answers

IMAGE_DEPENDENCE = "image_dependence"  # the reward that asks the model
GREY = 128
SUMMED = ("dapo", "cispo", "vespo")  # TRL divides their sums by the step's tokens; other losses are means over answers
SEEDS = 2**20  # of answers of one generation; generations of one seed


@dataclass
class Examples:
    """What reward functions see of rows: `prompt` (messages) and columns such as `truth`."""

    train: datasets.Dataset
    test: datasets.Dataset | None


class SharedPrefixGRPOTrainer(StepTrainer, GRPOTrainer):
    """See the module's text.

    Attributes:
        sampled: the row number of each answer that TRL's code works on.
        features: of images of this generation's rows, where they are not kept and do not change.
    """

    counted = "answers"
    blank = False  # images are, for a reward
    reward_func_names: list[str]
    num_generations: int
    max_completion_length: int
    top_k: int
    args: Any

    def __init__(self, model: Any, *, examples: Examples, **kwargs: Any) -> None:
        """As StepTrainer; `examples`: of the same rows."""
        self.examples = examples
        self.sampled: list[int] = []
        self.units: list[Batch] = []
        self.features: dict[int, torch.Tensor] = {}
        args = kwargs["args"]
        with overridden(args, beta=0.0):  # else TRL would put a second, frozen adapter on the model for the reference
            super().__init__(model, **kwargs)
        self.beta = args.beta
        self.planned = [size for size in (self.num_generations >> i for i in range(8)) if size]
        end = self._tokenizer.convert_tokens_to_ids(END)
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

    @property
    def current_rows(self) -> PackedDataset:
        """That answers are sampled for: of training, or held out."""
        rows = self.rows if self.model.training else self.eval_rows  # type: ignore[union-attr]
        assert rows is not None
        return rows

    def has_images(self, row: int) -> bool:
        return bool(self.current_rows.images[row])

    def features_of(self, row: int) -> torch.Tensor:
        """(n, tokens, H) of a row's images; of a frozen tower computed once for sampling and all passes."""
        if row in self.features:
            return self.features[row]
        images = self.current_rows.images_of(row)
        if "features" in images:
            return images["features"]
        with torch.no_grad():
            features = tile_features(self.model, images["tiles"], self.pixels)
        if self.frozen_tower:
            self.features[row] = features
        return features

    @property
    def frozen_tower(self) -> bool:
        core = core_of(self.accelerator.unwrap_model(self.model))
        return not is_trainable(core.vision_model, core.connector)

    # Log-probabilities

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: Any = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Of `self.sampled`'s answers, (N, logits_to_keep) each; without gradients in as many parts as memory needs."""
        ids, mask = (part[:, -logits_to_keep:].cpu() for part in (input_ids, attention_mask))
        answers = [row[: int(count)] for row, count in zip(ids, mask.sum(1), strict=True)]
        if torch.is_grad_enabled():
            logps, entropies = self.score(model, self.sampled, answers, logits_to_keep)
            return logps, entropies, None
        logps = torch.zeros(2, len(answers), logits_to_keep, device=input_ids.device)
        for part in self.parts(range(len(answers)), self.micro_batch):
            logps[:, part] = self.score_in_parts(model, part, answers, logits_to_keep)
        return logps[0], logps[1], None

    def score_in_parts(self, model: nn.Module, part: list[int], answers: Any, width: int) -> torch.Tensor:
        try:
            return torch.stack(
                self.score(model, [self.sampled[i] for i in part], [answers[i] for i in part], width)
            ).float()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self.running = part
            self.halve_micro_batch(error)
        parts = self.parts(part, self.micro_batch)
        return torch.cat([self.score_in_parts(model, own, answers, width) for own in parts], dim=1)

    def score(
        self, model: nn.Module, rows: Sequence[int], answers: Sequence[torch.Tensor], width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of answers' tokens, (N, width) each, zero outside; groups share prompts.

        Args:
            rows: whose prompts `answers` belong to; answers: (C,) token ids each; an empty one is left out.
        """
        places: dict[int, list[int]] = defaultdict(list)
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            if len(answer):
                places[row].append(i)
        device = self.args.device
        labels = torch.full((len(rows), width + 1), -100, device=device)
        if not places:
            nothing = torch.zeros(len(rows), width, device=device)
            return nothing, nothing
        prompts = [self.current_rows.prompt_ids(row) for row in places]
        groups = [[answers[i] for i in own] for own in places.values()]
        targets = [[i * width for i in own] for own in places.values()]
        packed: Batch = pack_answers(prompts, groups, targets, self.rows.image_token_id)
        packed |= self.images_of(places)
        packed = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in packed.items()
        }
        with self.accelerator.autocast():
            outputs = model(packed=packed, labels=labels, temperature=self.temperature)
        return outputs.log_probs, outputs.entropy

    def row_sizes(self, rows: Sequence[int], counted: int) -> np.ndarray:
        """With `counted` answers of the greatest length: the first as chosen, all others together as rejected."""
        sizes = self.rows.sizes(rows)
        sizes[:, 1], sizes[:, 2] = self.max_completion_length, (counted - 1) * self.max_completion_length
        return sizes

    def log_probs_of(self, rows: Sequence[int], counted: int) -> torch.Tensor:
        answers = [torch.ones(self.max_completion_length, dtype=torch.int64)] * len(rows) * counted
        numbers = [row for row in rows for _ in range(counted)]
        logps, _ = self.score(self.model, numbers, answers, self.max_completion_length)  # type: ignore[arg-type]
        return logps

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

    @torch.no_grad()
    def mean_logps(self, answers: list[list[int]], blank: bool) -> list[float]:
        """Mean log-probability per token of `self.sampled`'s answers, in nats; `blank`: with blank images."""
        width = max(map(len, answers))
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(own) for own in answers], batch_first=True)
        mask = torch.tensor([[i < len(own) for i in range(width)] for own in answers])
        with overridden(self, blank=blank):
            logps, *_ = self._get_per_token_logps_and_entropies(self.model, ids, mask, width)  # type: ignore[arg-type]
        return (logps.sum(1).cpu() / mask.sum(1)).tolist()

    def images_of(self, rows: Sequence[int] | dict[int, Any]) -> Batch:
        """`features` of these rows' images, or `tiles` where the tower is trained or the images are blank."""
        if self.blank:
            counts = [self.current_rows.sizes([row])[0, 3] for row in rows]
            return {"tiles": self.rows.no_tiles.new_full((sum(counts), *self.rows.no_tiles.shape[1:]), GREY)}
        if not self.frozen_tower:
            return {"tiles": torch.cat([self.current_rows.images_of(row)["tiles"] for row in rows])}
        return {
            "features": torch.cat([self.features_of(row).to(self.args.device) for row in rows if self.has_images(row)])
        }

    def parts(self, answers: Sequence[int], size: int) -> list[list[int]]:
        """Numbers of answers in parts of at most `size`, those of a row in one part where they fit."""
        parts: list[list[int]] = [[]]
        for _, group in groupby(sorted(answers, key=lambda i: self.sampled[i]), key=lambda i: self.sampled[i]):
            own = list(group)
            if parts[-1] and len(parts[-1]) + len(own) > size:
                parts.append([])
            while len(parts[-1]) + len(own) > size:
                parts[-1], own = own[:size], own[size:]
                parts.append([])
            parts[-1] += own
        return [part for part in parts if part]

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

    def snapshot(self) -> Any:
        entropy = {name: getattr(self, name, None) for name in ("entropy_coef", "_entropy_window_stats")}
        return super().snapshot(), entropy

    def restore(self, before: Any) -> None:
        rest, entropy = before
        vars(self).update(entropy)
        super().restore(rest)

    def describe(self, running: Sequence[int]) -> str:
        (row,) = running
        return f"a single answer of at most {self.max_completion_length} tokens, to row {row}"

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
