"""Log-probabilities of sampled answers: those to one prompt share it, and its image, in every pass."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from smolvlm_exp.engine.generation.answers import row_features
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.inputs.packing import pack_answers
from smolvlm_exp.engine.memory.probe import out_of_memory
from smolvlm_exp.engine.model_parts import core_of, is_trainable
from smolvlm_exp.engine.step_trainer import StepTrainer, overridden

Batch = dict[str, Any]  # TRL's: `rows` (N,) and the other tensors of N answers

GREY = 128  # of a blank image


class GroupTrainer(StepTrainer):
    """What TRL's GRPOTrainer calls for log-probabilities, on packed groups; comes before it among a class's bases.

    Attributes:
        sampled: the row number of each answer that TRL's code works on.
        features: of images of this generation's rows, where they are not kept and do not change; by whether the row is
            one of training, and its number.
    """

    counted = "answers"
    blank = False  # images are, for a reward
    max_completion_length: int
    temperature: float

    def __init__(self, model: Any, **kwargs: Any) -> None:
        """As StepTrainer."""
        self.sampled: list[int] = []
        self.features: dict[tuple[bool, int], torch.Tensor] = {}
        super().__init__(model, **kwargs)

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
        key = self.model.training, row  # type: ignore[union-attr]
        if key in self.features:
            return self.features[key]
        with torch.no_grad():
            features = row_features(self.model, self.current_rows, self.pixels, row)
        if self.current_rows.features is None and self.frozen_tower:
            self.features[key] = features
        return features

    @property
    def frozen_tower(self) -> bool:
        core = core_of(self.accelerator.unwrap_model(self.model))
        return not is_trainable(core.vision_model, core.connector)

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
        except (RuntimeError, MemoryError) as error:
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
            count = self.current_rows.sizes(list(rows))[:, 3].sum()
            return {"tiles": self.rows.no_tiles.new_full((count, *self.rows.no_tiles.shape[1:]), GREY)}
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

    def describe(self, running: Sequence[int]) -> str:
        (row,) = running
        return f"a single answer of at most {self.max_completion_length} tokens, to row {row}"
