"""One normal form for preference data, whatever the source, prepared and checked before any training.

A row is {images, prompt, chosen, rejected[, truth]}: `images` a list of images, the others lists of chat messages whose
content is a list of parts, one `{"type": "image"}` part for each image. It is the schema of
HuggingFaceH4/rlaif-v_formatted, and what TRL's vision collators read. `truth` is JSON or null: what is known of the
image, against which answers are scored (truth.py). Rows may have a truth and no `chosen` and `rejected`: they can be
evaluated on, and trained on by what learns from scores. Rows without `rejected` are what trainer=sft learns from.

Facts about a row are computed here, once, and travel with it: `image_sha256` of each image's file, `tile_rows` and
`tile_columns` of its tiles, `token_ids` (prompt, chosen and rejected, cut to data.max_length) and their counts.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.images import ImageLimits
from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.parallel import hash_of, map_rows, worker_count
from smolvlm_exp.data.tokens import processor_digests
from smolvlm_exp.data.truth import vocabulary_of
from smolvlm_exp.data.validation import COUNTS, SIDES, RowPreparer, prepared_features
from smolvlm_exp.data.vocabulary import Words
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.hub import Provenance
from smolvlm_exp.utils.phases import phase

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
VERSION = 4  # raise when prepared rows come out differently: it is part of the key under which they are cached


@dataclass
class Preferences:
    """Checked rows, and what the checks found."""

    train: "Dataset"
    test: "Dataset"
    report: dict[str, dict[str, Any]]  # per split: rows, skipped, cut, image_tokens, longest; test's also_in_train
    words: Words | None = None  # reads the objects out of a caption, where the truth of captions is known
    prints: dict[str, list[bytes]] = field(default_factory=dict)  # per split, `fingerprints` of its rows


def source_of(config: DataConfig) -> Any:
    """The module in data/sources."""
    return import_module(f"smolvlm_exp.data.sources.{config.source}")


def provenance(config: DataConfig) -> Provenance:
    """Where the rows come from."""
    source = source_of(config)
    if hasattr(source, "provenance"):
        found: Provenance = source.provenance(config)
        return found
    return Provenance(config.source, None, getattr(source, "LICENSE", None))


def load_rows(config: DataConfig, split: str, answers: bool = True, rejected: bool = True) -> "Dataset":
    """The rows of `train` or `test`, not yet checked; without `chosen` where that alone is of no use.

    Args:
        answers: whether those to train on must have `chosen` and `rejected`; else a truth is enough.
        rejected: whether `chosen` alone is not enough.

    Raises:
        RequestError: the rows cannot be read, or lack answers.
    """
    rows: Dataset = source_of(config).load(config, getattr(config, split))
    if rejected or not answers:
        rows = without_single_answers(rows)
    if split == "train" and answers and not rejected and "chosen" not in rows.column_names:
        raise RequestError(
            f"data.train={config.train}: these rows have no answer to learn from: `answer`, `chosen`, or a "
            "conversation that ends with the assistant's turn."
        )
    if split == "train" and answers and "chosen" not in rows.column_names:
        raise RequestError(
            f"data.train={config.train}: these rows are questions without preferred answers, chosen and rejected. What "
            f"is known of their images is what trainer=grpo learns from and task=mine makes pairs of; task=evaluate "
            f"scores answers by it; trainer=sft learns from answers without a rejected one."
        )
    return rows


def without_single_answers(rows: "Dataset") -> "Dataset":
    """Rows in which `chosen` has no `rejected` beside it, as rows to score answers to."""
    single = "chosen" in rows.column_names and "rejected" not in rows.column_names
    return rows.remove_columns("chosen") if single else rows


@phase("data")
def load_preferences(
    config: DataConfig,
    processor: "ProcessorMixin",
    folder: Path,
    splits: Sequence[str] = SPLITS,
    answers: bool = True,
    rejected: bool = True,
) -> Preferences:
    """Read, prepare and check the splits; bad rows stop the run here, or are listed in `folder/skipped_rows.jsonl`.

    Args:
        answers, rejected: as of `load_rows`.
    """
    loaded, checked, report, bad = {}, {}, {}, []
    for split in splits:
        loaded[split] = load_rows(config, split, answers, rejected)
        checked[split], bad_rows = separate(prepare(loaded[split], processor, config))
        report[split] = {**count(checked[split]), "skipped": len(bad_rows)}
        bad += [{"split": split, **row} for row in bad_rows]
    if bad and config.on_bad_row == "error":
        raise RequestError(
            f"{len(bad)} bad row{'s' * (len(bad) > 1)} in data={config.source}:\n{listed(bad)}\n"
            "Fix them, or leave them out with data.on_bad_row=skip."
        )
    if bad:
        lines = "".join(json.dumps(b, ensure_ascii=False) + "\n" for b in bad)
        (folder / "skipped_rows.jsonl").write_text(lines, encoding="utf-8")
    for split, counts in report.items():
        good, skipped = counts["rows"], counts["skipped"]
        if not good:
            why = f"\n{listed(bad)}" if bad else ""
            raise RequestError(
                f"data={config.source}: no good row is left in data.{split}={getattr(config, split)}.{why}"
            )
        if skipped > config.max_bad_rows * (good + skipped):
            raise RequestError(
                f"{skipped} of {good + skipped} {split} rows are bad, more than data.max_bad_rows="
                f"{config.max_bad_rows:g}: they are listed in skipped_rows.jsonl in the run's folder.\n{listed(bad)}\n"
                "Fix them, or raise data.max_bad_rows."
            )
        log.info(
            f"data: {good} {split} rows, {counts['image_tokens']} image tokens per row, longest row "
            f"{counts['longest']} tokens, {counts['cut']} answers cut, {skipped} bad rows skipped"
        )
    prints = {split: fingerprints(rows) for split, rows in checked.items()}
    if len(checked) > 1:
        leaked = leaked_rows(prints["train"], prints["test"])
        report["test"]["also_in_train"] = len(leaked)
        if leaked:
            log.warning(f"data leakage: {len(leaked)} test rows are also in train (e.g. row {leaked[0]})")
    train, test = (checked[split] if split in checked else next(iter(checked.values())).select([]) for split in SPLITS)
    return Preferences(train, test, report, words_of(config, loaded), prints)


def listed(bad: Sequence[dict[str, Any]], count: int = 10) -> str:
    """The first bad rows and what is wrong with them, one a line."""
    origins = [f" ({row['from']})" if "from" in row else "" for row in bad]
    lines = [f"  {row['split']} row {row['row']}{o}: {row['reason']}" for row, o in zip(bad, origins, strict=True)]
    return "\n".join(lines[:count]) + (f"\n  ... and {len(lines) - count} more" if len(lines) > count else "")


def words_of(config: DataConfig, loaded: "dict[str, Dataset]") -> Words | None:
    """The source's vocabulary, or else the names of the objects that its rows have.

    Those of a split that is not `loaded` count too: a run and what reads one split of its data need the same words.
    """
    source = source_of(config)
    if hasattr(source, "words"):
        return source.words(config)
    if vocabulary_of(truths_of(loaded.values())) is None:
        return None
    splits = dict(loaded)
    for split in set(SPLITS) - loaded.keys():
        with suppress(RequestError):  # rows to evaluate on may come without rows to train on
            splits[split] = load_rows(config, split, answers=False)
    return vocabulary_of(truths_of(splits[split] for split in SPLITS if split in splits))


def truths_of(splits: "Iterable[Dataset]") -> Iterator[str | None]:
    """Of all rows."""
    for rows in splits:
        if "truth" in rows.column_names:
            yield from rows["truth"][:]


def separate(rows: "Dataset") -> "tuple[Dataset, list[dict[str, Any]]]":
    """The good rows, and for each bad one its number, where it was read (if known) and why it is bad."""
    problems = rows["problem"][:]
    if not any(problems):
        return rows, []
    origins: list[dict[str, str]] = [{}] * len(rows)
    if "origin" in rows.column_names:
        origins = [{"from": origin} for origin in rows["origin"][:]]
    bad = [{"row": i, **origins[i], "reason": problem} for i, problem in enumerate(problems) if problem]
    return rows.select([i for i, problem in enumerate(problems) if not problem]), bad


def count(rows: "Dataset") -> dict[str, Any]:
    """A split's numbers of rows and tokens."""
    columns = rows.select_columns(list(COUNTS))[:]
    sides = zip(*(columns[f"{side}_tokens"] for side in SIDES), strict=True)
    lengths = [prompt + max(answers) for prompt, *answers in sides]
    return {
        "rows": len(rows),
        "cut": sum(uncut > length for uncut, length in zip(columns["uncut_tokens"], lengths, strict=True)),
        "image_tokens": round(sum(columns["image_tokens"]) / max(len(rows), 1), 1),
        "longest": max(columns["uncut_tokens"], default=0),
    }


def fingerprints(rows: "Dataset") -> list[bytes]:
    """A hash of each row's question and of its images' files."""
    columns = rows.select_columns(["image_sha256", "prompt"])[:]
    return [
        hashlib.sha256(b"".join([text_of(prompt).encode(), *images])).digest()
        for images, prompt in zip(columns["image_sha256"], columns["prompt"], strict=True)
    ]


def leaked_rows(train: Sequence[bytes], test: Sequence[bytes]) -> list[int]:
    """By fingerprints: the held-out rows whose images and question are those of a training row."""
    seen = set(train)
    return [i for i, fingerprint in enumerate(test) if fingerprint in seen]


def prepare(rows: "Dataset", processor: "ProcessorMixin", config: DataConfig) -> "Dataset":
    """A source's rows with their images and prompts prepared, and the columns of `RowValidator` added.

    Cached on disk, unless the rows are in memory alone: a second run over the same rows decodes and tokenises nothing.
    """
    from datasets import Image, List

    plain, features = List(Image(decode=False)), prepared_features(rows.features)
    undecoded = rows if rows.features["images"] == plain else rows.cast_column("images", plain)
    settings = [config.max_edge, *astuple(ImageLimits.of(config)), config.max_length, config.on_long_answer]
    # not of `undecoded`, which a cast gives another fingerprint in every process
    key = hash_of("rows", VERSION, rows._fingerprint, settings, processor_digests(processor))
    prepare_rows, workers = RowPreparer(processor, config, features), worker_count(config.num_proc, len(rows))
    return map_rows(undecoded, prepare_rows, features, key, workers, "checking rows", cached=bool(rows.cache_files))
