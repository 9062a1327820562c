"""Captions of COCO's images, scored by CHAIR (arXiv 1809.02156), from COCO's annotation files and CHAIR's synonyms.

What is in an image: what COCO's annotators outlined (`instances_val2014.json`) and, as in CHAIR, what its reference
captions name (`captions_val2014.json`).
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from smolvlm_exp.data.benchmarks import question_rows, read_object, require_columns
from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.loading import read_text
from smolvlm_exp.data.vocabulary import Vocabulary
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset

# CHAIR's own rules: a baby elephant is no person, nor is a passenger train, and home plate is no dish.
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
PHRASES = {f"{age} {animal}": animal for animal in ANIMALS for age in ("baby", "adult")}
PHRASES |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
PHRASES |= {"bow tie": "tie", "toilet seat": "toilet", "home plate": "home plate", "hot dog": "hot dog"}


@dataclass
class Config(DataConfig):
    annotations: str = MISSING  # instances_*.json: images, annotations, categories
    images: str = MISSING  # the folder that holds the images
    synonyms: str | None = None  # CHAIR's synonyms.txt, one object per line, its name first; null: COCO's names alone
    captions: str | None = None  # captions_*.json: what reference captions name counts as present too
    question: str = "Please describe this image in detail."


def load(config: Config, split: str) -> "Dataset":
    """A caption question for every image that is in the folder and in the annotations: all are `test`."""
    path, folder, names = Path(config.annotations), Path(config.images).expanduser(), words(config)
    instances = read_instances(config)
    kinds = {kind["id"]: kind["name"] for kind in listed(instances, "categories", path, id=int, name=str)}
    objects = {number: [name for _, name in names(kind) if name] for number, kind in kinds.items()}
    unknown = next((kinds[number] for number, synonyms in objects.items() if not synonyms), None)
    if unknown:
        raise RequestError(f"data.synonyms={config.synonyms} has no line with {unknown}, a category of {path}.")
    present: dict[int, set[str]] = defaultdict(set)  # names of objects by image
    for number, outline in enumerate(listed(instances, "annotations", path, image_id=int, category_id=int), start=1):
        if outline["category_id"] not in objects:
            raise RequestError(f"{path}, annotations, entry {number}: there is no category {outline['category_id']}.")
        present[outline["image_id"]].update(objects[outline["category_id"]])
    if config.captions:
        captions = read_object(Path(config.captions), "data.captions", {"annotations": list})
        for reference in listed(captions, "annotations", Path(config.captions), image_id=int, caption=str):
            present[reference["image_id"]].update(name for _, name in names(reference["caption"]) if name)
    questions = [
        (image["file_name"], config.question, {"kind": "caption", "objects": sorted(present[image["id"]])})
        for image in listed(instances, "images", path, id=int, file_name=str)
        if (folder / image["file_name"]).is_file()
    ]
    if folder.is_dir() and not questions:
        raise RequestError(f"data.images={config.images}: none of the images in {path} is in this folder.")
    return question_rows(questions, config.images, split)


def words(config: Config) -> Vocabulary:
    """Which words and phrases name which object."""
    if config.synonyms:
        lines = read_text(Path(config.synonyms), "data.synonyms").splitlines()
        groups = [[word.strip() for word in line.split(",") if word.strip()] for line in lines if line.strip()]
        names = {word: group[0] for group in groups for word in group}
    else:
        kinds = listed(read_instances(config), "categories", Path(config.annotations), name=str)
        names = {kind["name"]: kind["name"] for kind in kinds}
    return Vocabulary(names | {phrase: names.get(word) for phrase, word in PHRASES.items()})


def read_instances(config: Config) -> dict[str, Any]:
    columns = {"images": list, "annotations": list, "categories": list}
    return read_object(Path(config.annotations), "data.annotations", columns)


def listed(content: dict[str, Any], part: str, path: Path, **columns: type) -> list[dict[str, Any]]:
    """The entries of a part of a file, all checked to have these columns."""
    entries = enumerate(content[part], start=1)
    return [require_columns(entry, f"{path}, {part}, entry {n}", columns) for n, entry in entries]
