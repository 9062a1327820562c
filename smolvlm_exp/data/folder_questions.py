"""The images of a folder and the questions about them that task=generate answers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import json_lines

EXAMPLE = '{"image": "cat.jpg", "question": "What is it?"}'
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class Question:
    image: str  # as the file of questions names it, or its path below the folder
    question: str


def find_questions(images: str | None, question: str, questions: str | None) -> tuple[Path, list[Question]]:
    """The folder that image paths are relative to, and the questions in order.

    Args:
        images, question, questions: task=generate's settings.
    """
    if images and not Path(images).is_dir():
        raise RequestError(f"task.images={images}: there is no such folder.")
    if questions:
        file = Path(questions)
        if not file.is_file():
            raise RequestError(f"task.questions={questions}: there is no such file.")
        folder = Path(images) if images else file.parent
        return folder, list(dict.fromkeys(read_questions(file)))
    if not images:
        raise RequestError(
            f"task=generate needs images: task.images=FOLDER, or task.questions=FILE (a line each, {EXAMPLE})."
        )
    folder = Path(images)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not files:
        raise RequestError(f"task.images={images}: no image is there ({', '.join(IMAGES)}).")
    if not any(path.stat().st_size for path in files):
        raise RequestError(f"task.images={images}: all {len(files)} images are empty files.")
    return folder, [Question(str(path.relative_to(folder)), question) for path in files]


def read_questions(file: Path) -> Iterator[Question]:
    for number, line in json_lines(file.read_text(encoding="utf-8-sig")):
        try:
            entry = json.loads(line)
            yield Question(str(entry["image"]), str(entry["question"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RequestError(f"{file}, line {number}: expected {EXAMPLE}.") from None
