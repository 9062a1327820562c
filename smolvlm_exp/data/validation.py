"""The checks that every row passes before anything is loaded, without decoding an image."""

from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.messages import Message, text_of
from smolvlm_exp.data.tokens import RowTokenizer, control_tokens

if TYPE_CHECKING:
    from datasets import Features

SIDES = ("prompt", "chosen", "rejected")
LISTS = ("tile_rows", "tile_columns", "token_ids")  # of each image, of each image, of all sides
COUNTS = ("prompt_tokens", "image_tokens", "chosen_tokens", "rejected_tokens", "uncut_tokens")


def facts_schema() -> "Features":
    """The columns that `RowValidator` adds to a row. `uncut_tokens`: of prompt and longer answer before max_length."""
    from datasets import Features, List, Value

    lists, counts = dict.fromkeys(LISTS, List(Value("int32"))), dict.fromkeys(COUNTS, Value("int32"))
    return Features({"problem": Value("string"), **lists, **counts})


class RowValidator:
    """What is wrong with a prepared row, if anything; its images' tiles; its token ids and their counts."""

    def __init__(self, processor: Any, max_length: int | None, on_long_answer: str) -> None:
        self.image_processor, self.image_token_id = processor.image_processor, processor.image_token_id
        self.tokenize, self.controls = RowTokenizer(processor), control_tokens(processor)
        self.max_length, self.on_long_answer = max_length, on_long_answer

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The columns of `facts_schema`."""
        messages = {side: row[side] for side in SIDES if side in row}
        problem = row["problem"] or row_problem(messages, len(row["sizes"]), self.controls)
        if problem:
            return {"problem": problem, **{name: [] for name in LISTS}, **dict.fromkeys(COUNTS, 0)}
        tiles = [self.image_processor.get_number_of_image_patches(height, width)[1:] for width, height in row["sizes"]]
        ids = self.tokenize(messages, tiles)
        prompt, *answers = ids.values()
        longest, images = max(map(len, answers), default=0), prompt.count(self.image_token_id)
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
    """What is wrong with a row of `images` images; empty when nothing is."""
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
            return f"`{side}` has the role {' and '.join(sorted(roles))}: an answer is the assistant's"
    prompt = messages["prompt"]
    if prompt[-1]["role"] != "user":
        return f"`prompt` ends with a turn of the {prompt[-1]['role']}: the last must be the user's"
    if not images:
        return "it has no image"
    placeholders = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
    if placeholders != images:
        return f"it has {images} images but its prompt names {placeholders}"
    if "chosen" in messages and text_of(messages["chosen"]).strip() == text_of(messages["rejected"]).strip():
        return "`chosen` and `rejected` are the same"
    return ""
