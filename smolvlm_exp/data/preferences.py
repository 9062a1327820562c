"""One normal form for preference data, whatever the source, prepared and checked before any training.

A row is {images, prompt, chosen, rejected[, truth]}: `images` a list of images, the others lists of chat messages whose
content is a list of parts, one `{"type": "image"}` part for each image. It is the schema of
HuggingFaceH4/rlaif-v_formatted, and what TRL's vision collators read. `truth` is JSON or null: what is really in the
image (evaluation/held_out.py scores answers against it). Rows of a benchmark have a truth, but no `chosen` and
`rejected`; they can be evaluated on, not trained on.

Facts about a row are computed here, once, and travel with it: `image_sha256` of each image's file, `tile_rows` and
`tile_columns` of its tiles, `token_ids` (prompt, chosen and rejected, cut to data.max_length) and their counts.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.images import ImageError, ImageLimits, prepare_image, read_image_bytes
from smolvlm_exp.data.loading import worker_count
from smolvlm_exp.data.messages import Message, text_of
from smolvlm_exp.data.tokens import control_tokens, escape_control_tokens, tokenize_row
from smolvlm_exp.data.vocabulary import Words
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin

log = logging.getLogger(__name__)

SIDES = ("prompt", "chosen", "rejected")
LISTS = ("tile_rows", "tile_columns", "token_ids")  # per image, per image, of all sides
# uncut_tokens: of the prompt and the longer answer, before they are cut to data.max_length
COUNTS = ("prompt_tokens", "image_tokens", "chosen_tokens", "rejected_tokens", "uncut_tokens")

VERSION = 3  # raise when prepared rows come out differently: it is part of the key under which `datasets` caches them


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


def load_rows(config: DataConfig, split: str) -> "Dataset":
    """The rows of `train` or `test`, not yet checked; RequestError where those to train on have no answers."""
    rows: Dataset = source_of(config).load(config, getattr(config, split))
    if split == "train" and "chosen" not in rows.column_names:
        raise RequestError(
            f"data.train={config.train}: these rows are questions without preferred answers. Use data={config.source} "
            "with task=evaluate, not training."
        )
    return rows


def load_preferences(
    config: DataConfig, processor: "ProcessorMixin", folder: Path, splits: Sequence[str] = ("train", "test")
) -> Preferences:
    """Read, prepare and check the splits; bad rows stop the run here, or are listed in `folder/skipped_rows.jsonl`."""
    checked, report, bad = {}, {}, []
    for split in splits:
        checked[split], bad_rows = separate(prepare(load_rows(config, split), processor, config))
        report[split] = {**count(checked[split]), "skipped": len(bad_rows)}
        bad += [{"split": split, **row} for row in bad_rows]
    if bad and config.on_bad_row == "error":
        origins = [f" ({b['from']})" if "from" in b else "" for b in bad]
        reasons = [f"  {b['split']} row {b['row']}{o}: {b['reason']}" for b, o in zip(bad, origins, strict=True)]
        listed = "\n".join(reasons[:10])
        more = f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise RequestError(
            f"{len(bad)} bad rows in data={config.source}:\n{listed}{more}\n"
            "Fix them, or leave them out with data.on_bad_row=skip."
        )
    if bad:
        lines = "".join(json.dumps(b, ensure_ascii=False) + "\n" for b in bad)
        (folder / "skipped_rows.jsonl").write_text(lines, encoding="utf-8")
    for split, counts in report.items():
        good, skipped = counts["rows"], counts["skipped"]
        if not good:
            raise RequestError(f"data={config.source}: no good row is left in data.{split}={getattr(config, split)}.")
        if skipped > config.max_bad_rows * (good + skipped):
            raise RequestError(
                f"{skipped} of {good + skipped} {split} rows are bad, more than data.max_bad_rows="
                f"{config.max_bad_rows:g}: they are listed in skipped_rows.jsonl in the run's folder.\n"
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
    source = source_of(config)
    words = source.words(config) if hasattr(source, "words") else None
    return Preferences(checked.get("train", checked["test"].select([])), checked["test"], report, words, prints)


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

    `datasets` caches the result on disk by content, so a second run over the same rows decodes and tokenises nothing.
    """
    from datasets import Features, Image, List, Value, concatenate_datasets

    plain, workers = Image(decode=False), worker_count(config.num_proc, len(rows))
    undecoded = rows if rows.features["images"] == List(plain) else rows.cast_column("images", List(plain))
    columns = {
        "images": List(Image()),
        "image_sha256": List(Value("binary")),
        "sizes": List(List(Value("int32"))),
        "problem": Value("string"),
    }
    prepared = undecoded.map(
        prepare_row,
        fn_kwargs={
            "max_edge": config.max_edge,
            "limits": ImageLimits.of(config),
            "controls": control_tokens(processor),
            "version": VERSION,
        },
        features=Features({**undecoded.features, **columns}),  # not inferred: a first batch may hold only bad rows
        num_proc=workers,
        desc="images",
    )
    lists, counts = dict.fromkeys(LISTS, List(Value("int32"))), dict.fromkeys(COUNTS, Value("int32"))
    facts = prepared.remove_columns("images").map(
        RowValidator(processor, config.max_length, config.on_long_answer),
        remove_columns=[name for name in prepared.column_names if name not in ("images", "problem")],
        features=Features({"problem": Value("string"), **lists, **counts}),
        num_proc=workers,
        desc="checks",
    )
    return concatenate_datasets([prepared.remove_columns(["sizes", "problem"]), facts], axis=1)


def prepare_row(
    row: dict[str, Any], max_edge: int, limits: ImageLimits, controls: list[str], version: int = VERSION
) -> dict[str, Any]:
    """Prepare a row's images, unless its source has found a problem, and escape control tokens in its prompt.

    Returns:
        `images` (PNG bytes where a change was needed, else the given ones), `image_sha256` of those bytes, `sizes`
        [[width, height], ...], `prompt`, `problem` (empty when fine).
    """
    images, hashes, sizes, problem = [], [], [], row.get("problem") or ""
    for number, entry in enumerate([] if problem else row["images"] or [], start=1):
        try:
            data, size = prepare_image(read_image_bytes(entry, limits), max_edge, limits)
        except ImageError as error:
            problem = f"image {number} {error}"
            break
        images.append({"bytes": data, "path": None})
        hashes.append(hashlib.sha256(data).digest())
        sizes.append(list(size))
    if problem:
        images, hashes, sizes = [], [], []
    prompt = escape_control_tokens(row["prompt"] or [], controls)
    return {"images": images, "image_sha256": hashes, "sizes": sizes, "prompt": prompt, "problem": problem}


class RowValidator:
    """What is wrong with a prepared row, if anything; its images' tiles; its token ids and their counts."""

    def __init__(self, processor: Any, max_length: int | None, on_long_answer: str) -> None:
        self.processor, self.controls = processor, control_tokens(processor)
        self.max_length, self.on_long_answer = max_length, on_long_answer
        self.spans: dict[tuple[int, int], list[int]] = {}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`problem`, and the columns `LISTS` and `COUNTS`."""
        messages = {side: row[side] for side in SIDES if side in row}
        problem = row["problem"] or row_problem(messages, len(row["sizes"]), self.controls)
        if problem:
            return {"problem": problem, **{name: [] for name in LISTS}, **dict.fromkeys(COUNTS, 0)}
        count_tiles = self.processor.image_processor.get_number_of_image_patches
        tiles = [count_tiles(height, width)[1:] for width, height in row["sizes"]]
        ids = tokenize_row(self.processor, messages, tiles, self.spans)
        prompt, *answers = ids.values()
        longest, images = max(map(len, answers), default=0), prompt.count(self.processor.image_token_id)
        room = None if self.max_length is None else self.max_length - len(prompt)
        if room is not None and room <= 0:
            problem = (
                f"the prompt alone is {len(prompt)} tokens ({images} of the image) and "
                f"data.max_length={self.max_length} leaves none for the answer"
            )
        elif room is not None and longest > room and self.on_long_answer == "report":
            problem = f"the longer answer runs {longest - room} tokens past data.max_length={self.max_length}"
        chosen, rejected = (ids.get(side, [])[:room] for side in ("chosen", "rejected"))
        return {
            "problem": problem,
            "tile_rows": [rows for rows, _ in tiles],
            "tile_columns": [columns for _, columns in tiles],
            "token_ids": [*prompt, *chosen, *rejected],
            "prompt_tokens": len(prompt),
            "image_tokens": images,
            "chosen_tokens": len(chosen),
            "rejected_tokens": len(rejected),
            "uncut_tokens": len(prompt) + longest,
        }


def row_problem(messages: dict[str, list[Message]], images: int, controls: list[str]) -> str:
    """What is wrong with the messages of a row with this many images; empty when nothing is."""
    for side, turns in messages.items():
        text = text_of(turns or [])
        if not text.strip():
            return f"`{side}` is empty"
        control = next((c for c in controls if c in text), None)
        if control:
            return f"`{side}` contains {control}, which the model would read as a control token"
        if side != "prompt" and any(part["type"] == "image" for turn in turns for part in turn["content"]):
            return f"`{side}` has an image, or <image>, in it: an answer is text"
        roles = {turn["role"] for turn in turns}
        if side != "prompt" and roles != {"assistant"}:
            return f"`{side}` has the role {' and '.join(sorted(roles))}: an answer's role is assistant"
    prompt = messages["prompt"]
    if prompt[-1]["role"] != "user":
        return f"`prompt` ends with a turn of the {prompt[-1]['role']}; the last turn must be the user's"
    if not images:
        return "it has no image"
    placeholders = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
    if placeholders != images:
        return f"it has {images} images but its prompt names {placeholders}"
    if "chosen" in messages and text_of(messages["chosen"]).strip() == text_of(messages["rejected"]).strip():
        return "`chosen` and `rejected` are the same"
    return ""
