"""The checks that every row passes before anything is loaded, without decoding a picture."""

from collections.abc import Callable
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.control_tokens import control_tokens
from smolvlm_exp.data.loading import worker_count
from smolvlm_exp.data.messages import text_of
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin


def row_origin(rows: "Dataset", index: int) -> dict[str, str]:
    """Where a row was read, as `pairs.jsonl line 12`, where its source says so."""
    return {"from": rows[index : index + 1]["origin"][0]} if "origin" in rows.column_names else {}


def origin_suffix(bad: dict[str, Any]) -> str:
    return f" ({bad['from']})" if "from" in bad else ""


def check_bad_row_share(report: dict[str, dict[str, Any]], config: DataConfig) -> None:
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


def validate_rows(
    rows: "Dataset", processor: "ProcessorMixin", config: DataConfig
) -> tuple[list[int], dict[str, Any], list[tuple[int, str]]]:
    """Look at every row without decoding a picture: the good indices, the counts, (index, reason) of the bad."""
    from datasets import Features, Value

    found = rows.remove_columns("images").map(
        RowValidator(processor, config.max_length, config.on_long_answer),
        remove_columns=[name for name in rows.column_names if name not in ("images", "problem")],
        features=Features(problem=Value("string"), over=Value("bool"), image=Value("int32"), length=Value("int32")),
        num_proc=worker_count(config.num_proc, len(rows)),
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


class RowValidator:
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
    for column in message_columns(row):
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


def message_columns(row: dict[str, Any]) -> list[str]:
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
        texts = apply_chat_template({side: row[side] for side in message_columns(row)}, processor)
        spans = [image_span(*tiles.get_number_of_image_patches(height, width)[1:]) for width, height in row["sizes"]]
        words = sum(length(piece) for piece in texts["prompt"].split(processor.image_token))
        return {
            "prompt": words + sum(total for total, _ in spans),
            "image": sum(image for _, image in spans),
            **{side: length(texts[side]) for side in message_columns(row) if side != "prompt"},
        }

    return count
