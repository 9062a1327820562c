"""Pairs of a model's own answers, by which its exports are compared with it where the held-out rows have no pairs."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.loading import undecoded
from smolvlm_exp.data.messages import assistant, features
from smolvlm_exp.data.preferences import prepare, separate
from smolvlm_exp.engine.generation.answers import sample_answers
from smolvlm_exp.engine.generation.decoder import decoder_obstacle
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.evaluation.held_out import HeldOut
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SAMPLED = 4  # answers to a row at a try, of which one should differ from the greedy answer
TRIES = 8  # at most: a model is often certain of a yes or no
ENOUGH = 32  # rows with pairs, after which no other is tried again
FEWEST = 2  # rows with pairs that an export can be compared by


def own_pairs(model: Any, held_out: HeldOut, config: DataConfig, max_new_tokens: int, seed: int) -> HeldOut:
    """The held-out rows with the model's own answers: chosen is its greedy answer, rejected one that it samples.

    See `other_answers`. A row without such an answer, or whose greedy answer is empty, is left out.

    Args:
        config: by which the rows were prepared.
        max_new_tokens: of an answer; seed: of the sampled ones.

    Raises:
        RequestError: fewer than `FEWEST` rows are left, or the engine's sampler cannot run this model.
    """
    if obstacle := decoder_obstacle(model):
        raise RequestError(
            f"data={config.source} has no pairs held out, and the engine, which would sample answers to make them of, "
            f"cannot run this model: {obstacle}."
        )
    model.eval()
    greedy = held_out.answers(model, len(held_out), Sampling(max_new_tokens))
    others = other_answers(model, held_out, greedy, max_new_tokens, seed)
    made = prepared_pairs(held_out, greedy, others, config)
    left = f"{len(made)} of {len(held_out)} held-out rows"
    if len(made) < FEWEST:
        raise RequestError(
            f"data={config.source} has no pairs held out, and {left} have two different answers of the model's own "
            f"(greedy, and {SAMPLED * TRIES} sampled at temperature 1): {FEWEST} are the least that an export can be "
            "compared by. Hold out more rows for the run (data.test_fraction, a larger data.test), or give the rows "
            "`chosen` and `rejected`."
        )
    log.info(f"data={config.source} has no pairs held out: they are the model's own answers, in {left}")
    return HeldOut(
        replace(held_out.preferences, test=made),
        held_out.processor,
        held_out.batch_size,
        held_out.max_length,
        held_out.packed,
    )


def other_answers(model: Any, held_out: HeldOut, greedy: list[str], max_new_tokens: int, seed: int) -> list[str]:
    """To each row the unlikeliest of `SAMPLED` answers at temperature 1 that differs from `greedy`; empty: none does.

    The unlikeliest, because a rounding error may decide which of two equally likely answers is preferred. Try n of row
    i draws answer r with the seed `seed + (n rows + place of i among those left) SAMPLED + r`.
    """
    processor: Any = held_out.processor
    prompts, found = held_out.prompts(model, len(greedy)), [""] * len(greedy)
    sampling = Sampling(max_new_tokens, temperature=1.0, seed=seed, suppress=(processor.image_token_id,))
    for _ in range(TRIES):
        left = [i for i, text in enumerate(found) if not text]
        sampled = sample_answers(model, processor, [prompts[i] for i in left], sampling, SAMPLED, logps=True)
        for i, group in zip(left, sampled, strict=True):
            ids = [answer.ids for answer in sorted(group, key=lambda answer: answer.mean_logp)]
            texts = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
            found[i] = next((text for text in texts if text not in ("", greedy[i])), "")
        if sum(map(bool, found)) >= min(ENOUGH, len(found)):
            break
        sampling = replace(sampling, seed=sampling.seed + len(greedy) * SAMPLED)
    return found


def prepared_pairs(held_out: HeldOut, chosen: list[str], rejected: list[str], config: DataConfig) -> "Dataset":
    """The rows with these answers, prepared as any others are; without those whose answers make no good row."""
    from datasets import Dataset, Features, Value

    given = undecoded(held_out.preferences.test, ["images", "prompt", "truth"])
    pairs = [
        {**row, "chosen": [assistant(first)], "rejected": [assistant(second)], "problem": ""}
        for row, first, second in zip(given, chosen, rejected, strict=True)
    ]
    rows = Dataset.from_list(pairs, features=Features({**features(), "truth": Value("string")}))
    here = replace(config, num_proc=1)  # a process with a model in it and its threads should not fork
    return separate(prepare(rows, held_out.processor, here))[0]
