"""One normal form for preference data, whatever the source, and the checks every row passes before any training.

A row is {images, prompt, chosen, rejected[, truth]}: `images` a list of pictures, the others lists of chat messages
whose content is a list of parts, one `{"type": "image"}` part for each picture. It is the schema of
HuggingFaceH4/rlaif-v_formatted, and what TRL's vision collators read. `truth` is JSON or null: what is really in the
picture (evaluation/held_out.py scores answers against it). Rows of questions with truth alone have no `chosen` and
`rejected`; they can be evaluated on, not trained on.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from smolvlm_exp.data.control_tokens import as_text, control_tokens
from smolvlm_exp.data.leakage import fingerprints, overlap
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import at_least, one_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin

    from smolvlm_exp.evaluation.hallucination import Words

Message = dict[str, Any]


@dataclass
class DataConfig:
    """What every data source is asked for. A source's own `Config` (in `data/<source>.py`) adds to it."""

    source: str = MISSING  # the module in smolvlm_exp/data that yields the rows
    train: str = "train"  # split or slice to tune on, as `train[:6%]`
    test: str = "test"  # held-out rows: evaluated before and after, never trained on
    max_edge: int = at_least(1, 512)  # pictures whose long edge is larger are shrunk to it (LANCZOS)
    num_proc: int | None = None  # processes that prepare pictures; null: one a core, at most 16
    max_length: int | None = None  # tokens in prompt plus answer; null: no limit. Image tokens are never cut
    on_long_answer: str = one_of("cut", "report")  # an answer that runs past max_length is shortened, or is a bad row
    on_bad_row: str = one_of("error", "skip")
    max_bad_rows: float = at_least(0, 0.2)  # with skip: the share of a split that may be bad before the run stops
    max_pixels: int = at_least(1, 100_000_000)  # of a picture, looked at before it is decoded
    max_image_mib: int = at_least(1, 64)  # of a picture's file
    first_frame: bool = False  # take the first frame of animations and of TIFFs with several pages


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
        good, report[split], problems = check(rows, processor, config)
        bad += [{"split": split, "row": i, **origin(rows, i), "reason": reason} for i, reason in problems]
        checked[split] = rows if len(good) == len(rows) else rows.select(good)
    if bad and config.on_bad_row == "error":
        listed = "\n".join(f"  {b['split']} row {b['row']}{where(b)}: {b['reason']}" for b in bad[:10])
        more = f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise RequestError(
            f"{len(bad)} bad rows in data={config.source}:\n{listed}{more}\n"
            "Mend them, or leave them out with data.on_bad_row=skip."
        )
    if bad:
        lines = "".join(json.dumps(b, ensure_ascii=False) + "\n" for b in bad)
        (folder / "skipped_rows.jsonl").write_text(lines, encoding="utf-8")
        refuse_many(report, config)
    for split, rows in checked.items():
        if not len(rows):
            raise RequestError(f"data={config.source}: no good row is left in data.{split}={getattr(config, split)}.")
        counts = report[split]
        print(
            f"data: {counts['rows']} {split} rows, {counts['image_tokens']} image tokens a row, "
            f"longest {counts['longest']}, {counts['cut']} answers cut, {counts['skipped']} bad rows skipped"
        )
    prints = {split: fingerprints(rows) for split, rows in checked.items()}
    if len(checked) > 1:
        both = overlap(prints["train"], prints["test"])
        report["test"]["also_in_train"] = len(both)
        if both:
            print(f"data: {len(both)} test rows are trained on too, as row {both[0]}: scores on them prove nothing")
    words = source.words(config) if hasattr(source, "words") else None
    return Preferences(checked.get("train", checked["test"].select([])), checked["test"], report, words, prints)


def origin(rows: "Dataset", index: int) -> dict[str, str]:
    """Where a row was read, as `pairs.jsonl line 12`, where its source says so."""
    return {"from": rows[index : index + 1]["origin"][0]} if "origin" in rows.column_names else {}


def where(bad: dict[str, Any]) -> str:
    return f" ({bad['from']})" if "from" in bad else ""


def refuse_many(report: dict[str, dict[str, Any]], config: DataConfig) -> None:
    """Raises:
    RequestError: so many rows of a split are bad that something is wrong with all of it.
    """
    for split, counts in report.items():
        bad, rows = counts["skipped"], counts["skipped"] + counts["rows"]
        if counts["rows"] and bad > config.max_bad_rows * rows:
            raise RequestError(
                f"{bad} of {rows} {split} rows are bad, more than data.max_bad_rows={config.max_bad_rows:g} of them: "
                "they are listed in skipped_rows.jsonl in the run's folder.\nMend them, or raise data.max_bad_rows."
            )


def user(question: str, images: int = 1) -> Message:
    """The user's turn: the pictures first, then the question."""
    parts: list[dict[str, str | None]] = [{"type": "image", "text": None} for _ in range(images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def assistant(answer: str) -> Message:
    """The assistant's turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def text_of(messages: list[Message]) -> str:
    """The words of a conversation, without its pictures."""
    return "\n".join(p["text"] for m in messages for p in m["content"] if p["type"] == "text" and p["text"])


def prepare(rows: "Dataset", config: DataConfig, controls: Sequence[str] = ()) -> "Dataset":
    """Bring the pictures into shape, in parallel; adds `sizes` [[width, height], ...] and `problem` (empty when fine).

    Control tokens that a prompt's text spells become text; see controls.py.

    `datasets` keeps the result on disk by content, so a second run over stored rows does not decode them again.
    """

    from datasets import Features, Image, List, Value

    from smolvlm_exp.data.images import VERSION, Limits

    plain = Image(decode=False)
    undecoded = rows if rows.features["images"] == List(plain) else rows.cast_column("images", List(plain))
    added = {"images": List(Image()), "sizes": List(List(Value("int32"))), "problem": Value("string")}
    return undecoded.map(
        prepare_row,
        fn_kwargs={
            "max_edge": config.max_edge,
            "version": VERSION,
            "limits": Limits.of(config),
            "controls": list(controls),
        },
        features=Features({**undecoded.features, **added}),  # not inferred: a first batch may hold bad rows alone
        num_proc=workers(config.num_proc, len(rows)),
        desc="pictures",
    )


def prepare_row(row: dict[str, Any], controls: Sequence[str], **kwargs: Any) -> dict[str, Any]:
    """See `prepare`."""
    from smolvlm_exp.data.images import prepare_images

    return {**prepare_images(row, **kwargs), "prompt": as_text(row["prompt"] or [], controls)}


def workers(asked: int | None, rows: int) -> int | None:
    """Processes for `rows` pictures: as many as asked for; else one a core, where there is work enough."""
    count = asked or min(os.cpu_count() or 1, 16)
    return count if count > 1 and (asked or rows >= 2048) else None


def check(
    rows: "Dataset", processor: "ProcessorMixin", config: DataConfig
) -> tuple[list[int], dict[str, Any], list[tuple[int, str]]]:
    """Look at every row without decoding a picture: the good indices, the counts, (index, reason) of the bad."""
    from datasets import Features, Value

    found = rows.remove_columns("images").map(
        Examiner(processor, config.max_length, config.on_long_answer),
        remove_columns=[name for name in rows.column_names if name not in ("images", "problem")],
        features=Features(problem=Value("string"), over=Value("bool"), image=Value("int32"), length=Value("int32")),
        num_proc=workers(config.num_proc, len(rows)),
        desc="checks",
    )[:]
    good = [index for index, problem in enumerate(found["problem"]) if not problem]
    image_tokens = [found["image"][index] for index in good]
    counts = {
        "rows": len(good),
        "skipped": len(rows) - len(good),
        "cut": sum(found["over"][index] for index in good),
        "image_tokens": round(sum(image_tokens) / max(len(image_tokens), 1), 1),
        "longest": max((found["length"][index] for index in good), default=0),
    }
    return good, counts, [(index, problem) for index, problem in enumerate(found["problem"]) if problem]


class Examiner:
    """A row -> its `problem` (empty when fine), whether its longer answer runs `over`, its image tokens, its length."""

    def __init__(self, processor: Any, max_length: int | None, on_long_answer: str) -> None:
        self.processor, self.max_length, self.on_long_answer = processor, max_length, on_long_answer
        self.controls = control_tokens(processor)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "count"}

    @cached_property
    def count(self) -> Callable[[dict[str, Any]], dict[str, int]]:
        return token_counter(self.processor)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        problem = row["problem"] or row_problem(row, self.controls)
        if problem:
            return {"problem": problem, "over": False, "image": 0, "length": 0}
        tokens = self.count(row)
        length = tokens["prompt"] + max(tokens.get("chosen", 0), tokens.get("rejected", 0))
        over = length - self.max_length if self.max_length is not None else 0
        if self.max_length is not None and tokens["prompt"] >= self.max_length:
            problem = (
                f"the prompt alone is {tokens['prompt']} tokens ({tokens['image']} of the image) and "
                f"data.max_length={self.max_length} leaves none for the answer"
            )
        elif over > 0 and self.on_long_answer == "report":
            problem = f"the longer answer runs {over} tokens past data.max_length={self.max_length}"
        return {"problem": problem, "over": over > 0, "image": tokens["image"], "length": length}


def row_problem(row: dict[str, Any], controls: list[str]) -> str:
    """What is wrong with a row's messages, in plain words; empty when nothing is."""
    for column in sides(row):
        if not row[column] or not text_of(row[column]).strip():
            return f"`{column}` is empty"
        typed = next((c for c in controls if c in text_of(row[column])), None)
        if typed:
            return f"`{column}` contains {typed}, which the model would read as a control token"
        if column != "prompt" and any(p["type"] == "image" for m in row[column] for p in m["content"]):
            return f"`{column}` has a picture, or <image>, in it: an answer is text"
        said = {message["role"] for message in row[column]}
        if column != "prompt" and said != {"assistant"}:
            return f"`{column}` is said by {' and '.join(sorted(said))}: an answer is the assistant's"
    if row["prompt"][-1]["role"] != "user":
        return f"`prompt` ends with a turn of the {row['prompt'][-1]['role']}: the last is the user's"
    placeholders = sum(p["type"] == "image" for m in row["prompt"] for p in m["content"])
    if not row["sizes"]:
        return "it has no image"
    if placeholders != len(row["sizes"]):
        return f"it has {len(row['sizes'])} images but its prompt names {placeholders}"
    if "chosen" in row and text_of(row["chosen"]).strip() == text_of(row["rejected"]).strip():
        return "`chosen` and `rejected` are the same"
    return ""


def sides(row: dict[str, Any]) -> list[str]:
    """The columns of a row that hold messages."""
    return [name for name in ("prompt", "chosen", "rejected") if name in row]


def token_counter(processor: Any) -> Callable[[dict[str, Any]], dict[str, int]]:
    """A function that counts a row's tokens (prompt, image, chosen, rejected) exactly as the processor will make them.

    The image's tokens follow from its size alone, so no picture is decoded: R x C tiles and a global one, each
    `image_seq_len` long, with the tags between them.
    """
    from trl.data_utils import apply_chat_template

    tokenizer, tiles = processor.tokenizer, processor.image_processor

    @cache
    def image_span(rows: int, cols: int) -> tuple[int, int]:
        span = processor.replace_image_token({"rows": [[rows]], "cols": [[cols]]}, 0)
        ids = tokenizer(span, add_special_tokens=False)["input_ids"]
        return len(ids), ids.count(processor.image_token_id)

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def count(row: dict[str, Any]) -> dict[str, int]:
        texts = apply_chat_template({side: row[side] for side in sides(row)}, processor)
        spans = [image_span(*tiles.get_number_of_image_patches(height, width)[1:]) for width, height in row["sizes"]]
        words = sum(length(piece) for piece in texts["prompt"].split(processor.image_token))
        return {
            "prompt": words + sum(total for total, _ in spans),
            "image": sum(image for _, image in spans),
            **{side: length(texts[side]) for side in sides(row) if side != "prompt"},
        }

    return count
