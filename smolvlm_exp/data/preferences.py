"""One normal form for preference data, whatever the source, and the checks every row passes before any training.

A row is {images, prompt, chosen, rejected[, truth]}: `images` a list of pictures, the others lists of chat messages
whose content is a list of parts, one `{"type": "image"}` part for each picture. It is the schema of
HuggingFaceH4/rlaif-v_formatted, and what TRL's vision collators read. `truth` is JSON or null: what is really in the
picture (evaluation/held_out.py scores answers against it). Rows of questions with truth alone have no `chosen` and
`rejected`; they can be evaluated on, not trained on.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.control_tokens import control_tokens, escape_control_tokens
from smolvlm_exp.data.leakage import fingerprints, leaked_rows
from smolvlm_exp.data.loading import worker_count
from smolvlm_exp.data.validation import check_bad_row_share, origin_suffix, row_origin, validate_rows
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin

    from smolvlm_exp.data.vocabulary import Words

log = logging.getLogger(__name__)


@dataclass
class Preferences:
    """Checked rows, and what the checks found."""

    train: "Dataset"
    test: "Dataset"
    report: dict[
        str, dict[str, Any]
    ]  # a split's counts: rows, skipped, cut, image_tokens, longest; test's also_in_train
    words: "Words | None" = None  # reads the objects out of a caption, where the truth of captions is known
    prints: dict[str, list[bytes]] = field(default_factory=dict)  # a split's rows by question and pictures


def load_preferences(
    config: DataConfig, processor: "ProcessorMixin", folder: Path, splits: Sequence[str] = ("train", "test")
) -> Preferences:
    """Read, prepare and check the splits; bad rows stop the run here, or are listed in `folder/skipped_rows.jsonl`.

    Raises:
        RequestError: a row is bad and `data.on_bad_row=error`, or no good row is left in a split.
    """
    source = import_module(f"smolvlm_exp.data.sources.{config.source}")
    checked, report, bad = {}, {}, []
    for split in splits:
        rows = prepare(source.load(config, getattr(config, split)), config, control_tokens(processor))
        good, report[split], problems = validate_rows(rows, processor, config)
        bad += [{"split": split, "row": i, **row_origin(rows, i), "reason": reason} for i, reason in problems]
        checked[split] = rows if len(good) == len(rows) else rows.select(good)
    if bad and config.on_bad_row == "error":
        listed = "\n".join(f"  {b['split']} row {b['row']}{origin_suffix(b)}: {b['reason']}" for b in bad[:10])
        more = f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise RequestError(
            f"{len(bad)} bad rows in data={config.source}:\n{listed}{more}\n"
            "Mend them, or leave them out with data.on_bad_row=skip."
        )
    if bad:
        lines = "".join(json.dumps(b, ensure_ascii=False) + "\n" for b in bad)
        (folder / "skipped_rows.jsonl").write_text(lines, encoding="utf-8")
        check_bad_row_share(report, config)
    for split, rows in checked.items():
        if not len(rows):
            raise RequestError(f"data={config.source}: no good row is left in data.{split}={getattr(config, split)}.")
        counts = report[split]
        log.info(
            f"data: {counts['rows']} {split} rows, {counts['image_tokens']} image tokens a row, "
            f"longest {counts['longest']}, {counts['cut']} answers cut, {counts['skipped']} bad rows skipped"
        )
    prints = {split: fingerprints(rows) for split, rows in checked.items()}
    if len(checked) > 1:
        both = leaked_rows(prints["train"], prints["test"])
        report["test"]["also_in_train"] = len(both)
        if both:
            log.warning(
                f"data: {len(both)} test rows are trained on too, as row {both[0]}: scores on them prove nothing"
            )
    words = source.words(config) if hasattr(source, "words") else None
    return Preferences(checked.get("train", checked["test"].select([])), checked["test"], report, words, prints)


def prepare(rows: "Dataset", config: DataConfig, controls: Sequence[str] = ()) -> "Dataset":
    """Bring the pictures into shape, in parallel; adds `sizes` [[width, height], ...] and `problem` (empty when fine).

    Control tokens that a prompt's text spells become text; see control_tokens.py.

    `datasets` keeps the result on disk by content, so a second run over stored rows does not decode them again.
    """

    from datasets import Features, Image, List, Value

    from smolvlm_exp.data.images import VERSION, ImageLimits

    plain = Image(decode=False)
    undecoded = rows if rows.features["images"] == List(plain) else rows.cast_column("images", List(plain))
    added = {"images": List(Image()), "sizes": List(List(Value("int32"))), "problem": Value("string")}
    return undecoded.map(
        prepare_row,
        fn_kwargs={
            "max_edge": config.max_edge,
            "version": VERSION,
            "limits": ImageLimits.of(config),
            "controls": list(controls),
        },
        features=Features({**undecoded.features, **added}),  # not inferred: a first batch may hold bad rows alone
        num_proc=worker_count(config.num_proc, len(rows)),
        desc="pictures",
    )


def prepare_row(row: dict[str, Any], controls: Sequence[str], **kwargs: Any) -> dict[str, Any]:
    """See `prepare`."""
    from smolvlm_exp.data.images import prepare_images

    return {**prepare_images(row, **kwargs), "prompt": escape_control_tokens(row["prompt"] or [], controls)}
