"""task=generate: answers about images, base and tuned side by side, as JSONL that a second run completes."""

import json
import logging
import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.folder_questions import Question, find_questions
from smolvlm_exp.data.images import ImageError, ImageLimits, locate, open_image
from smolvlm_exp.data.messages import user
from smolvlm_exp.engine.fingerprint import weights_key
from smolvlm_exp.engine.generation.sampler import ROWS
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.evaluation.generate import ANSWERS, generate_answers
from smolvlm_exp.models.model import load_finetuned_model, load_processor
from smolvlm_exp.runs.checkpoint import disk_error_as_run_error
from smolvlm_exp.runs.folder import lock_file
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import write_text
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.progress import progress

log = logging.getLogger(__name__)

WEIGHTS = 16  # characters of a hash: 64 bits


def generate(config: Config, folder: Path) -> Path:
    """Answer the questions that the file of answers lacks, on disk batch by batch; returns the file.

    A line has "image", "question" and "answer"; with `model.adapter` "base" and "tuned" in place of "answer"; "problem"
    in their place for an image that cannot be read; and "weights", a hash of the model that answered.
    """
    task = config.task
    images, questions = find_questions(config.task.images, config.task.question, config.task.questions)
    path = Path(task.answers) if task.answers else folder / "answers.jsonl"
    with lock_file(path), disk_error_as_run_error(path.parent):
        answer(config, path, images, questions)
    log.info(relative_to_cwd(path))
    return path


def answer(config: Config, path: Path, images: Path, questions: list[Question]) -> None:
    """Append to the file of answers what it lacks."""
    task, names = config.task, ("base", "tuned") if config.model.adapter else ("answer",)
    done, others = answered(path, names)
    left = [question for question in questions if question not in done]
    count = len(questions)
    log.info(f"generate: {count} questions, {count - len(left)} of them answered in {relative_to_cwd(path)}")
    model = load_finetuned_model(config.model, config.quant, config.adapter, config.seed)
    weights = weights_key(model, "default" if config.model.adapter else None)[:WEIGHTS]
    if others - {weights}:
        raise RequestError(
            f"{path} has answers of other weights than those that model.id={config.model.id} and model.adapter="
            f"{config.model.adapter} hold now: name another file in task.answers."
        )
    models = {name: model.disable_adapter if name == "base" else nullcontext for name in names}
    processor = load_processor(config.model)
    max_edge, limits = config.data.max_edge, ImageLimits.of(config.data)
    with path.open("a", encoding="utf-8") as file, progress(ANSWERS, len(left) * len(names)) as advance:
        for start in range(0, len(left), ROWS):
            rows: list[dict[str, Any]] = []
            lines: list[dict[str, Any]] = [asdict(question) for question in left[start : start + ROWS]]
            for line in lines:
                try:
                    image = open_image(locate(line["image"], images), max_edge, limits)
                    rows.append({"images": [image], "prompt": [user(line["question"])]})
                except ImageError as error:
                    line["problem"] = f"the image {error}"
                    advance(len(names))
            for name, mode in models.items():
                with mode():
                    sampling = Sampling(task.max_new_tokens, temperature=task.temperature, seed=config.seed + start)
                    texts = generate_answers(model, processor, rows, sampling)
                for line, text in zip((line for line in lines if "problem" not in line), texts, strict=True):
                    line[name] = text
            lines = [{**line, "weights": weights} for line in lines]
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def answered(path: Path, names: tuple[str, ...]) -> tuple[set[Question], set[str]]:
    """The questions that the file of answers has, and the weights that answered them, where it says so.

    A partial last line, as a killed run leaves it, is cut off.

    Raises:
        RequestError: it is not a file of answers, or they have other keys than `names`.
    """
    if not path.is_file():
        return set(), set()
    text = path.read_text(encoding="utf-8", errors="replace")
    complete = text[: text.rfind("\n") + 1]
    done, weights = set(), set()
    for number, line in enumerate(complete.split("\n")[:-1], start=1):  # an empty line is not an answer either
        try:
            entry = json.loads(line)
            done.add(Question(entry["image"], entry["question"]))
            weights.add(str(entry.get("weights", "")))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RequestError(f"{path}, line {number}: this is not a file of answers; name another.") from None
        if "problem" not in entry and not all(name in entry for name in names):
            has = ", ".join(key for key in entry if key not in ("image", "question", "weights"))
            raise RequestError(
                f"{path}, line {number} has {has}, and this command writes {', '.join(names)}: these are answers of "
                "other models. Name another file in task.answers."
            )
    if complete != text:
        write_text(path, complete)
    return done, weights - {""}
