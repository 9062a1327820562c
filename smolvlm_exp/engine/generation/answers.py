"""Answers of a model to prompts, with as many at a time as memory allows."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from smolvlm_exp.engine.forward import Pixels, image_features
from smolvlm_exp.engine.generation.decoder import Decoder
from smolvlm_exp.engine.generation.sampler import Answer, Prompt, SamplingPlan, plan_sampling, sample
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.memory.probe import free_memory, in_halves, out_of_memory
from smolvlm_exp.engine.model_parts import core_of
from smolvlm_exp.utils.progress import track

log = logging.getLogger(__name__)

ANSWERS = "answers"  # the label of a progress bar


def sample_answers(
    model: Any, processor: Any, prompts: Sequence[Prompt], sampling: Sampling, answers: int = 1, logps: bool = False
) -> list[list[Answer]]:
    """So many `answers` to each prompt, by the adapters that are active now; in smaller parts where memory runs out.

    Answer r to prompt i draws with the seed `sampling.seed + i * answers + r`, whatever is sampled beside it.

    Args:
        model: whose text model `Decoder` can run; see `decoder_obstacle`.
        logps: of the drawn tokens are wanted.
    """
    if not prompts:
        return []
    end, image = processor.tokenizer.eos_token_id, processor.image_token_id
    plan = plan_for(model, prompts, sampling, answers)
    while True:
        try:
            decoder = Decoder(model, plan.merge)
            parts = sample(decoder, prompts, sampling, end, image, answers, plan.rows, logps, plan.prefill_tokens)
            done = dict(track(parts, ANSWERS, len(prompts)))
            return [done[i] for i in range(len(prompts))]
        except (RuntimeError, MemoryError) as error:
            smallest = plan.rows == answers and not plan.merge
            if not out_of_memory(error) or (smallest and answers == 1):
                raise
        if smallest:
            log.warning(f"Out of memory while sampling {answers} answers to a prompt: trying again with half of them")
            return halved(model, processor, prompts, sampling, answers, logps)
        fewer = max(1, min(plan.rows // answers, len(prompts)) // 2)
        plan = SamplingPlan(False, fewer * answers, max(len(p.ids) for p in prompts))
        torch.cuda.empty_cache()
        log.warning(f"Out of memory while sampling answers: trying again, {plan.rows} at a time")


def halved(
    model: Any, processor: Any, prompts: Sequence[Prompt], sampling: Sampling, answers: int, logps: bool
) -> list[list[Answer]]:
    """`sample_answers`, each prompt's in two parts, with the seeds that they have together."""
    drawn = []
    for i, prompt in enumerate(prompts):
        first = sampling.seed + i * answers
        parts = ((first, answers // 2), (first + answers // 2, answers - answers // 2))
        halves = [sample_answers(model, processor, [prompt], replace(sampling, seed=s), n, logps) for s, n in parts]
        drawn.append([answer for (own,) in halves for answer in own])
    return drawn


def plan_for(model: Any, prompts: Sequence[Prompt], sampling: Sampling, answers: int = 1) -> SamplingPlan:
    longest = max(len(prompt.ids) for prompt in prompts)
    return plan_sampling(model, free_memory(model.device), longest, sampling.max_new_tokens, answers)


def packed_prompts(model: Any, rows: PackedDataset, normalise: Pixels, numbers: Sequence[int]) -> list[Prompt]:
    """The prompts of rows by their numbers; features that are not kept are computed when a prompt is read."""
    return [
        Prompt(rows.prompt_ids(i), partial(row_features, model, rows, normalise, i) if rows.images[i] else None)
        for i in numbers
    ]


def row_features(model: Any, rows: PackedDataset, normalise: Pixels, row: int) -> torch.Tensor:
    """(n, tokens, H) of a row's images: those that are kept, or else computed now."""
    images = rows.images_of(row)
    return images["features"] if "features" in images else tile_features(model, images["tiles"], normalise)


def tile_features(model: Any, tiles: torch.Tensor, normalise: Pixels) -> torch.Tensor:
    """(n, 3, S, S) uint8 -> (n, tokens per tile, H), on the model's device."""
    return in_halves(
        lambda part: image_features(core_of(model), normalise(part.to(model.device))), tiles, "image tiles"
    )
