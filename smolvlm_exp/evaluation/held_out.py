"""A model evaluated on the held-out rows: preferences for any data, scored answers where the truth is known."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smolvlm_exp.engine.disk_cache import DiskCache
from smolvlm_exp.engine.fingerprint import weights_key
from smolvlm_exp.engine.forward import add_packed_forward, scores_packed
from smolvlm_exp.engine.generation.answers import packed_prompts, tile_features
from smolvlm_exp.engine.generation.decoder import decoder_obstacle
from smolvlm_exp.engine.generation.sampler import Prompt
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.inputs.tiles import pixels, tile
from smolvlm_exp.engine.layers.fuse import fuse_text
from smolvlm_exp.engine.model_parts import base_of, core_of
from smolvlm_exp.engine.precompute.features import keep_features
from smolvlm_exp.evaluation.generate import generate_answers
from smolvlm_exp.evaluation.image_reliance import ABLATED_ROWS, RowImages, chosen_drop, replacements
from smolvlm_exp.evaluation.preference import LOGPS, Images, Logps, answer_logps, packed_logps, preference_metrics
from smolvlm_exp.evaluation.reward_metrics import Scorer, Scores, reward_metrics
from smolvlm_exp.evaluation.statistics import Ratio
from smolvlm_exp.evaluation.truth_metrics import truth_metrics
from smolvlm_exp.utils.cores import usable_cores
from smolvlm_exp.utils.progress import track

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from smolvlm_exp.data.preferences import Preferences

ABLATION = "log-probs with other images"  # a progress bar's label
SAMPLES = 12  # answers that are generated for the report where no truth is known


@dataclass(frozen=True)
class Evaluation:
    ratios: dict[str, Ratio]
    logps: Logps | None  # None where rows have no answers
    answers: list[str]  # to the first rows, or to all where the truth is known

    @property
    def metrics(self) -> dict[str, float]:
        return {name: ratio.value for name, ratio in self.ratios.items()}


class HeldOut:
    """The held-out rows, as a model reads them.

    Models of PyTorch's read them packed, each image and prompt once for both answers; exported ones as stock TRL does.

    Attributes:
        rows: packed; their images' features are computed once where somebody lets them be kept (keep_features).
    """

    def __init__(
        self,
        preferences: "Preferences",
        processor: "ProcessorMixin",
        batch_size: int,
        max_length: int | None,
        packed: bool = True,
    ) -> None:
        """Opens no image.

        Args:
            batch_size: rows that are scored together.
            packed: whether models of PyTorch's read packed rows; else they too read them as stock TRL does.
        """
        self.preferences, self.processor, self.packed = preferences, processor, packed
        self.batch_size, self.max_length = batch_size, max_length
        self.rows, self.pixels = PackedDataset(preferences.test, processor), pixels(processor)
        if "chosen" in preferences.test.column_names and "rejected" not in preferences.test.column_names:
            self.rows = self.rows.chosen_only()
        self.replaced: dict[str, Images] | None = None  # tiles or features of `replacements`
        self.tower: tuple[str, str] | None = None  # whose features `precompute` has computed

    def __len__(self) -> int:
        return len(self.rows)

    def precompute(self, model: Any, store: DiskCache, num_proc: int) -> None:
        """Compute the images' features once for all that reads them, if `store` has room; again for another tower.

        Args:
            model: nothing in its vision tower or connector is trained.
            num_proc: processes that cut images into tiles; 0: this one.
        """
        if not self.reads_packed(model):
            return
        core = core_of(model)
        tower = weights_key(core.vision_model, "default"), weights_key(core.connector, "default")
        if tower != self.tower:
            self.tower, self.replaced, self.rows.features = tower, None, None
            keep_features(self.rows, model, self.pixels, store, num_proc)

    def logps(self, model: Any, count: int | None = None) -> Logps:
        """Of the answers of the first `count` rows, or of all."""
        count = len(self) if count is None else min(count, len(self))
        if self.reads_packed(model):
            return packed_logps(model, self.rows, self.batches(count))
        return self.stock_logps(model, self.preferences.test.select(range(count)))

    def stock_logps(self, model: Any, rows: Any, label: str = LOGPS) -> Logps:
        return answer_logps(model, self.processor, rows, self.batch_size, self.max_length, label)

    def image_reliance(self, model: Any, logps: Logps) -> dict[str, Ratio]:
        """What the first rows' chosen answers lose with other images; nothing where rows have no image.

        Args:
            logps: of all rows, just computed.
        """
        count = min(ABLATED_ROWS, len(self))
        batches = self.batches(len(self))[: -(-count // self.batch_size)]  # those in which the rows were scored
        if self.reads_packed(model):
            if self.replaced is None:
                self.replaced = self.packed_images(model, replacements(self.images(count)))
            others = {
                name: packed_logps(model, self.rows, batches, own, ABLATION) for name, own in self.replaced.items()
            }
        else:
            rows = list(self.preferences.test.select(range(batches[-1][-1] + 1)))
            others = {}
            for name, images in replacements(self.images(count)).items():
                changed = [{**row, "images": own} for row, own in zip(rows, images, strict=False)]
                others[name] = self.stock_logps(model, [*changed, *rows[count:]], ABLATION)
        return {name: chosen_drop(logps, other, count) for name, other in others.items()}

    def answers(self, model: Any, count: int, sampling: Sampling) -> list[str]:
        """To the first `count` rows' prompts."""
        rows = self.preferences.test.select(range(min(count, len(self))))
        prompts = self.prompts(model, len(rows)) if isinstance(model, nn.Module) else None
        return generate_answers(model, self.processor, rows, sampling, prompts)

    def blank_answers(self, model: Any, count: int, sampling: Sampling) -> list[str]:
        """As `answers`, with a grey image in place of each; empty where a row has no image."""
        images = self.images(min(count, len(self)))
        blank = replacements(images)["blank_image_drop"] if all(images) else []
        rows = [{"prompt": self.preferences.test[i]["prompt"], "images": own} for i, own in enumerate(blank)]
        return generate_answers(model, self.processor, rows, sampling)

    def scores(self, answers: Sequence[str], score: Scorer) -> tuple[dict[str, Scores], Scores]:
        """`score`'s of answers to the first rows."""
        rows = self.preferences.test.select_columns(["prompt", "truth"])[: len(answers)]
        ids = self.processor.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        return score(rows["prompt"], answers, ids, rows["truth"])

    def prompts(self, model: Any, count: int) -> list[Prompt]:
        """The first `count` rows', with what computes their images' features."""
        return packed_prompts(model, self.rows, self.pixels, range(min(count, len(self))))

    def images(self, count: int) -> RowImages:
        return [self.preferences.test[i]["images"] for i in range(count)]

    def batches(self, count: int) -> list[list[int]]:
        starts = range(0, count, self.batch_size)
        return [list(range(start, min(start + self.batch_size, count))) for start in starts]

    def reads_packed(self, model: Any) -> bool:
        """Not with eager attention, which has no packed form."""
        if not self.packed or not isinstance(model, nn.Module):
            return False
        base = base_of(model)
        if core_of(model).text_model.config._attn_implementation == "eager":
            return False
        if not scores_packed(base):
            add_packed_forward(base, self.pixels, ("log_probs",))
            if decoder_obstacle(model) is None:
                fuse_text(core_of(model), trains=False)  # training looks for itself
        return True

    @torch.no_grad()
    def packed_images(self, model: Any, replaced: dict[str, RowImages]) -> dict[str, Images]:
        """Their features where the rows' own are kept, since then they do not change either; else their tiles."""
        kept = self.rows.features is not None
        images = {id(image): image for rows in replaced.values() for own in rows for image in own}  # blank: shared

        def cut(image: Any) -> torch.Tensor:
            return tile(image, self.processor.image_processor)

        with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow lets the other threads run
            tiled = zip(images, track(pool.map(cut, images.values()), "other images", len(images)), strict=True)
            done = {i: tile_features(model, tiles, self.pixels).cpu() if kept else tiles for i, tiles in tiled}
        return {
            name: {i: {self.rows.kind: torch.cat([done[id(image)] for image in own])} for i, own in enumerate(rows)}
            for name, rows in replaced.items()
        }


def evaluate(
    model: Any,
    held_out: HeldOut,
    reference: Logps | None = None,
    beta: float = 1.0,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 256,
    score: Scorer | None = None,
    pairs: HeldOut | None = None,
) -> Evaluation:
    """Metrics as summary.json has them.

    Args:
        model: PyTorch's or an exported one.
        reference: the base model's log-probs, for the implicit reward; beta: DPO's.
        temperature, seed, max_new_tokens: of generated answers; a temperature of 0 is greedy.
        score: rewards the answers, where a truth is known.
        pairs: to take log-probabilities of; None: `held_out`, if it has any.
    """
    preferences, pairs = held_out.preferences, pairs or held_out
    truths = preferences.test["truth"][:] if "truth" in preferences.test.column_names else []
    known = any(truths)
    logps, ratios = None, dict[str, Ratio]()
    if "chosen" in pairs.preferences.test.column_names:
        logps = pairs.logps(model)
        ratios = preference_metrics(logps, reference, beta)
    sampling = Sampling(max_new_tokens, temperature=temperature, seed=seed)
    answers = held_out.answers(model, len(held_out) if known else SAMPLES, sampling)
    if known:
        ratios |= truth_metrics(answers, truths, preferences.words)
    if known and score:
        ratios |= reward_metrics(*held_out.scores(answers, score))
    if logps:
        ratios |= pairs.image_reliance(model, logps)
    return Evaluation(ratios, logps, answers)
