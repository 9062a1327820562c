"""A row as token ids: the chat template's text, with every image written out as its tiles."""

from typing import Any

from smolvlm_exp.data.messages import Message

FAKE, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"


def image_span(rows: int, columns: int, image_seq_len: int) -> str:
    """The text that stands for an image in a prompt: its tiles row by row, then the whole image as one more tile.

    Args:
        rows, columns: of its tiles; 0 where it is not split: then the whole image is its only tile.
        image_seq_len: tokens of a tile.
    """
    tile = IMAGE * image_seq_len
    lines = (
        "".join(f"{FAKE}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    )
    return "".join(lines) + ("\n" if rows else "") + f"{FAKE}{GLOBAL}{tile}{FAKE}"


class RowTokenizer:
    """A row's token ids, equal to those that TRL's collators make with the same processor.

    The texts around images are tokenised apart. That changes no id: an image begins and ends with a control token, and
    tokenizers split there before anything else.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.spans: dict[tuple[int, int], list[int]] = {}  # (rows, columns) of tiles -> an image's ids

    def __call__(self, messages: dict[str, list[Message]], tiles: list[tuple[int, int]]) -> dict[str, list[int]]:
        """
        Args:
            messages: `prompt`, and `chosen` and `rejected` where the row has answers.
            tiles: (rows, columns) of the tiles of each image in the prompt.
        """
        from trl.data_utils import apply_chat_template

        texts = apply_chat_template(messages, self.processor)
        prompt, *answers = (texts[name] for name in messages)
        pieces = prompt.split(self.processor.image_token)
        ids = self.ids([*pieces, *answers])
        joined = ids[0]
        for shape, piece in zip(tiles, ids[1 : len(pieces)], strict=True):
            if shape not in self.spans:
                self.spans[shape] = self.ids([image_span(*shape, self.processor.image_seq_len)])[0]
            joined = joined + self.spans[shape] + piece
        return dict(zip(messages, [joined, *ids[len(pieces) :]], strict=True))

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.processor.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
