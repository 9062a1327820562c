"""Answers sampled from a model and scored, on disk chunk by chunk, and the pairs made of them.

    answers.jsonl   the settings that decide the answers, then a line per row with its answers, scores and likelihoods
    pairs.jsonl     what data=files reads; images/ lies beside it
    summary.json, report.html

A second run completes answers.jsonl, and makes the other files anew.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.preferences import Preferences
from smolvlm_exp.engine.fingerprint import weights_key
from smolvlm_exp.engine.generation.answers import ANSWERS, packed_prompts, sample_answers
from smolvlm_exp.engine.generation.decoder import decoder_obstacle
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.inputs.tiles import pixels
from smolvlm_exp.engine.precompute.features import keep_features
from smolvlm_exp.models.model import load_finetuned_model
from smolvlm_exp.rewards.build import ASK_THE_MODEL, Rewards, checked_rewards
from smolvlm_exp.rewards.pairs import ScoredAnswer, select_pairs
from smolvlm_exp.runs.overrides import flatten
from smolvlm_exp.runs.resume_check import TRUTH, digest
from smolvlm_exp.tasks.mined import Mined, write_mined
from smolvlm_exp.tasks.train import reward_files
from smolvlm_exp.training.engine_setup import disk_cache, tiling_processes
from smolvlm_exp.utils.errors import RequestError, RunError
from smolvlm_exp.utils.files import write_text
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.phases import phase
from smolvlm_exp.utils.progress import progress

log = logging.getLogger(__name__)

CHUNK = 128  # rows whose answers are sampled, scored and written together
SEEDS = 2**32  # of the answers of one round; rounds of one seed: ROUND_SEEDS
ROUND_SEEDS = 2**10


def mine_pairs(
    config: Config, folder: Path, processor: Any, preferences: Preferences, round_number: int = 0
) -> dict[str, Any]:
    """Sample and score what `folder/answers.jsonl` lacks, and write the pairs; returns the content of summary.json.

    Args:
        preferences: whose training rows are answered; see data/preferences.py.
        round_number: rounds of one seed draw other answers.

    Raises:
        RequestError: the request cannot work here; nothing was sampled.
        RunError: too few rows have pairs.
    """
    rewards = checked_rewards(config.reward, preferences)
    if asking := next((name for name in rewards.functions if name in ASK_THE_MODEL), None):
        raise RequestError(
            f"reward.weights.{asking} asks a model that trains: leave it out with ~reward.weights.{asking}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    path, rows = folder / "answers.jsonl", len(preferences.train)
    known = {**reward_files(rewards, preferences), TRUTH: digest(preferences.train, ("truth",))}
    header = {"settings": deciding_settings(config) | known, "round": round_number}
    answers = read_answers(path, header, preferences.prints["train"])
    log.info(f"mine: {rows} rows, {len(answers)} of them answered in {relative_to_cwd(path)}")
    if len(answers) < rows:
        seed = (config.seed * ROUND_SEEDS + round_number) * SEEDS
        sampler = Sampler(config, processor, preferences, rewards, seed)
        header["weights"] = weights_key(sampler.model, "default" if config.model.adapter else None)
        if answers and first_line_of(path).get("weights") != header["weights"]:
            raise RequestError(
                f"{path} has answers of other weights than those that model.id={config.model.id} and model.adapter="
                f"{config.model.adapter} hold now: use another hydra.run.dir."
            )
        with path.open("a", encoding="utf-8") as file, progress(ANSWERS, rows - len(answers)):
            if not answers:
                file.write(json.dumps(header) + "\n")
            for start in range(len(answers), rows, CHUNK):
                chunk = sampler.chunk(range(start, min(start + CHUNK, rows)))
                lines = zip(preferences.prints["train"][start:], chunk, strict=False)
                file.write("".join(answers_line(row, own) for row, own in lines))
                file.flush()
                os.fsync(file.fileno())
                answers += chunk
    task = config.task
    limits = task.pairs_per_row, task.margin, task.max_length_ratio, task.rejected
    mined = Mined(preferences, answers, [select_pairs(own, *limits) for own in answers])
    if sum(map(bool, mined.pairs)) < 2:  # data=files could hold nothing out
        reasons = ", ".join(f"{reason} {count}" for reason, count in mined.without_pairs().items() if count)
        raise RunError(
            f"fewer than two rows have pairs (the others: {reasons}): their answers, in {relative_to_cwd(path)}, are "
            f"equally good by the group `reward`, or differ by less than task.margin={task.margin:g}. Raise "
            "task.temperature or task.num_generations, or lower task.margin."
        )
    return write_mined(config, folder, mined)


def deciding_settings(config: Config) -> dict[str, Any]:
    """Full name -> value of the settings that the answers and their scores follow from."""
    groups = {name: asdict(getattr(config, name)) for name in ("model", "quant", "adapter", "reward")}
    task = {name: getattr(config.task, name) for name in ("num_generations", "temperature", "max_new_tokens")}
    settings: dict[str, Any] = json.loads(json.dumps(flatten({**groups, "task": task, "seed": config.seed})))
    return settings


def first_line_of(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        header: dict[str, Any] = json.loads(file.readline())
    return header


def answers_line(fingerprint: bytes, answers: Sequence[ScoredAnswer]) -> str:
    line = {"row": fingerprint.hex(), "answers": [asdict(answer) for answer in answers]}
    return json.dumps(line, ensure_ascii=False) + "\n"


def read_answers(path: Path, header: dict[str, Any], fingerprints: Sequence[bytes]) -> list[list[ScoredAnswer]]:
    """The first rows' answers, in whole chunks; what a killed run has written of another one is cut off.

    Raises:
        RequestError: they are answers by other settings, or to other rows.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    first, *lines = text.split("\n")[:-1] or [""]
    if not first:
        path.unlink()  # killed within its first line
        return []
    try:
        saved, entries = json.loads(first), [json.loads(line) for line in lines]
        settings = {**saved["settings"]}
        rows = [bytes.fromhex(entry["row"]) for entry in entries]
        answers = [[ScoredAnswer(**answer) for answer in entry["answers"]] for entry in entries]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path} is not a file of answers ({error}): remove it.") from None
    if rows != list(fingerprints[: len(rows)]):
        raise RequestError(f"{path} has answers to other rows than data={{...}} gives now: use another hydra.run.dir.")
    check_header(path, settings, header["settings"])
    whole = len(rows) if len(rows) == len(fingerprints) else len(rows) // CHUNK * CHUNK
    kept = "".join(line + "\n" for line in [first, *lines[:whole]]) if whole else ""
    if kept != text:
        write_text(path, kept)
    return answers[:whole]


def check_header(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises:
    RequestError: the file's answers follow from other settings than this command's.
    """
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise RequestError(
                f"{path} has answers by {key}={before.get(key)}, and here it is {now.get(key)}: undo the change, or "
                "use another hydra.run.dir."
            )


class Sampler:
    """A model with the rows that it answers and the rewards that score the answers."""

    def __init__(self, config: Config, processor: Any, preferences: Preferences, rewards: Rewards, seed: int) -> None:
        """
        Raises:
            RequestError: the engine's sampler cannot run this model.
        """
        self.rows, self.processor, self.rewards = preferences.train, processor, rewards
        task = config.task
        self.answers = task.num_generations
        self.model: Any = load_finetuned_model(config.model, config.quant, config.adapter, config.seed)
        if obstacle := decoder_obstacle(self.model):
            raise RequestError(f"task=mine samples with the engine, which cannot run this model: {obstacle}.")
        self.model.requires_grad_(False).eval()
        self.packed, self.pixels = PackedDataset(self.rows, processor), pixels(processor)
        self.sampling = Sampling(
            task.max_new_tokens, temperature=task.temperature, seed=seed, suppress=(processor.image_token_id,)
        )
        store = replace(disk_cache(config.trainer), reused=False)
        keep_features(self.packed, self.model, self.pixels, store, tiling_processes(self.model, config.trainer))

    @phase("sampling")
    def chunk(self, numbers: range) -> list[list[ScoredAnswer]]:
        """The scored answers to these rows, whatever other chunks there are."""
        prompts = packed_prompts(self.model, self.packed, self.pixels, numbers)
        sampling = replace(self.sampling, seed=self.sampling.seed + numbers.start * self.answers)
        sampled = sample_answers(self.model, self.processor, prompts, sampling, self.answers, logps=True)
        flat = [answer for group in sampled for answer in group]
        ids = [answer.ids for answer in flat]
        texts = [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
        rows = self.rows.select_columns(["prompt", "truth"]).select(numbers)
        asked = [row for row in rows for _ in range(self.answers)]
        scores, totals = self.rewards.score_answers(
            [row["prompt"] for row in asked], texts, ids, [row["truth"] for row in asked]
        )
        each = ({name: own[i] for name, own in scores.items()} for i in range(len(flat)))
        scored = [
            ScoredAnswer(text, total, answer.mean_logp, len(answer.ids), answer.ended, rewards)
            for text, total, answer, rewards in zip(texts, totals, flat, each, strict=True)
        ]
        return [scored[i : i + self.answers] for i in range(0, len(scored), self.answers)]
