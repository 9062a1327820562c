"""The checks that every row passes before anything is loaded, without decoding an image."""

from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.control_tokens import control_tokens
from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.tokens import RowTokenizer

if TYPE_CHECKING:
    from datasets import Features


class RowValidator:
    """What is wrong with a prepared row, if anything; its images' tiles; its token ids, and how many of what."""

    def __init__(self, processor: Any, max_length: int | None, on_long_answer: str) -> None:
        self.image_processor, self.image_token_id = processor.image_processor, processor.image_token_id
        self.tokenize, self.controls = RowTokenizer(processor), control_tokens(processor)
        self.max_length, self.on_long_answer = max_length, on_long_answer

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The columns of `facts_schema`."""
        problem = row["problem"] or row_problem(row, self.controls)
        if problem:
            return {"problem": problem, **{name: [] for name in LISTS}, **dict.fromkeys(COUNTS, 0)}
        tiles = [self.image_processor.get_number_of_image_patches(height, width)[1:] for width, height in row["sizes"]]
        ids = self.tokenize({side: row[side] for side in message_columns(row)}, tiles)
        prompt, *answers = ids.values()
        length, images = len(prompt) + max(map(len, answers), default=0), prompt.count(self.image_token_id)
        room = None if self.max_length is None else self.max_length - len(prompt)
        if room is not None and room <= 0:
            problem = (
                f"the prompt alone is {len(prompt)} tokens ({images} of the image) and "
                f"data.max_length={self.max_length} leaves none for the answer"
            )
        elif room is not None and length - len(prompt) > room and self.on_long_answer == "report":
            problem = (
                f"the longer answer runs {length - len(prompt) - room} tokens past data.max_length={self.max_length}"
            )
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
            "uncut_tokens": length,
        }


SIDES = ("prompt", "chosen", "rejected")
LISTS = ("tile_rows", "tile_columns", "token_ids")  # of each image, of each image, prompt and chosen and rejected
COUNTS = ("prompt_tokens", "image_tokens", "chosen_tokens", "rejected_tokens", "uncut_tokens")


def facts_schema() -> "Features":
    """The columns that `RowValidator` adds to a row. `uncut_tokens`: of prompt and longer answer before max_length."""
    from datasets import Features, List, Value

    lists, counts = dict.fromkeys(LISTS, List(Value("int32"))), dict.fromkeys(COUNTS, Value("int32"))
    return Features({"problem": Value("string"), **lists, **counts})


def row_problem(row: dict[str, Any], controls: list[str]) -> str:
    """What is wrong with a row's messages, in plain words; empty when nothing is."""
    for column in message_columns(row):
        if not row[column] or not text_of(row[column]).strip():
            return f"`{column}` is empty"
        control = next((c for c in controls if c in text_of(row[column])), None)
        if control:
            return f"`{column}` contains {control}, which the model would read as a control token"
        if column != "prompt" and any(p["type"] == "image" for m in row[column] for p in m["content"]):
            return f"`{column}` has an image, or <image>, in it: an answer is text"
        roles = {message["role"] for message in row[column]}
        if column != "prompt" and roles != {"assistant"}:
            return f"`{column}` has the role {' and '.join(sorted(roles))}: an answer is the assistant's"
    if row["prompt"][-1]["role"] != "user":
        return f"`prompt` ends with a turn of the {row['prompt'][-1]['role']}: the last must be the user's"
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
    return [side for side in SIDES if side in row]
