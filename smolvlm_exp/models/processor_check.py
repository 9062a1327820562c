"""Whether a saved processor is complete, SmolVLM's, and that of the model next to it.

transformers loads much that is not: from a file that was cut off an error without its name, from another model's file
another model's processor, from a missing entry a default that fits no SmolVLM.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smolvlm_exp.data.messages import user
from smolvlm_exp.data.tokens import IMAGE, answer_end
from smolvlm_exp.models.resolution import FILES, RESTORE, Resolution, read_options, saved_resolution
from smolvlm_exp.utils.errors import RequestError, first_line

Find = Callable[[str], Path | None]  # a file of the model by its name, where it is on this disk

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TEMPLATE = ("chat_template.jinja", "chat_template.json")
UNUSED = "<end_of_utterance>"  # upstream's processor adds it to a tokenizer that has none, see `template_problems`
KINDS = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
QUESTION = "Is the star red?"


def check_files(find: Find, folder: Path | None) -> None:
    """What to say where transformers cannot load a model or its processor.

    Args:
        folder: which has to have all files that a processor needs; None: the model is the Hub's.

    Raises:
        RequestError: one of the files is damaged or missing.
    """
    for file in filter(None, map(find, (*FILES, *TOKENIZER, "config.json", "generation_config.json"))):
        read_options(file)
    if folder and saved_resolution(filter(None, map(find, FILES))) is None:
        raise RequestError(f"{folder} has no {' or '.join(FILES)} with an image processor.\n{RESTORE}")
    if folder and not find(TOKENIZER[0]):
        raise RequestError(f"{folder} has no {TOKENIZER[0]}.\n{RESTORE}")


def check_processor(processor: Any, find: Find) -> None:
    """
    Raises:
        RequestError: the loaded processor is not a SmolVLM's, or not that of the model whose config.json `find` finds.
    """
    parts = ((FILES, image_problems), (TOKENIZER, tokenizer_problems), (TEMPLATE, template_problems))
    config = read_options(file) if (file := find("config.json")) else {}
    for names, problems in parts:
        for problem in problems(processor, config):
            file = next(filter(None, map(find, names)), None)
            raise RequestError(f"{file or names[0]} is not this SmolVLM's: {problem}.\n{RESTORE}")


def image_problems(processor: Any, config: dict[str, Any]) -> Iterator[str]:
    images: Any = getattr(processor, "image_processor", processor)  # transformers may find a tokenizer and no more
    if not type(images).__name__.startswith(KINDS):
        yield f"{type(images).__name__} in place of {KINDS[0]}"
        return
    try:
        resolution = Resolution.of(images.to_dict())
    except ValueError as error:
        yield str(error)
        return
    patch, scale = (config.get("vision_config") or {}).get("patch_size"), config.get("scale_factor")
    tokens = processor.image_seq_len
    if patch and scale and (resolution.tile // patch) ** 2 // scale**2 != tokens:
        yield f"a tile of {resolution.tile} pixels is not {tokens} tokens in the model of config.json"


def tokenizer_problems(processor: Any, config: dict[str, Any]) -> Iterator[str]:
    tokenizer = processor.tokenizer
    known, size = tokenizer.get_vocab(), (config.get("text_config") or {}).get("vocab_size")
    if (expected := config.get("image_token_id", known[IMAGE])) != known[IMAGE]:
        yield f"{IMAGE} is token {known[IMAGE]}, and in config.json {expected}"
    if size and max(number for token, number in known.items() if token != UNUSED) >= size:
        yield f"{len(tokenizer)} tokens, and config.json has {size}"


def template_problems(processor: Any, config: dict[str, Any]) -> Iterator[str]:
    if not processor.chat_template:
        yield "there is no chat template"
        return
    try:
        text = processor.apply_chat_template([user(QUESTION, 1)], add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may fail in any way
        yield first_line(error).rstrip(".")
        return
    if IMAGE not in text or QUESTION not in text:
        yield "the chat template leaves out a message's image or its text"
        return
    try:
        end = answer_end(processor)
    except ValueError as error:
        yield str(error)
        return
    if (size := (config.get("text_config") or {}).get("vocab_size")) and end >= size:
        yield f"an answer ends with token {end}, and config.json has {size}"
