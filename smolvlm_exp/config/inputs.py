"""What a command names on this disk, looked at before anything is imported that takes seconds."""

from importlib import import_module
from pathlib import Path

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.folder_questions import find_questions
from smolvlm_exp.models.adapter import find_adapter
from smolvlm_exp.reporting.trackers.config import check_installed
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.hub import is_hub_id

READ_DATA = ("train", "evaluate", "mine", "export", "preview")  # tasks
TRACKED = ("train", "evaluate", "mine", "compare")  # tasks
WITHOUT_MODEL = ("doctor", "plan", "compare", "runs")  # tasks that work also where torch does not
# source -> its settings that are folders, and those that are files
PATHS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "files": (("folder",), ()),
    "amber": (("folder", "images"), ()),
    "coco": (("images",), ("annotations", "captions", "synonyms")),
    "pope": (("images",), ("questions",)),
}


def check_inputs(config: Config) -> None:
    """
    Raises:
        RequestError: a folder or a file is missing, has no images, or only empty ones.
    """
    task, model = config.task, config.model
    if task.name in TRACKED:
        check_installed(config.tracker)
    if config.reward.user and task.name == "train" and not config.trainer.samples_answers:
        raise RequestError(
            "reward.user: this trainer learns from pairs and calls no reward. Add trainer=grpo, or have the reward "
            "make the pairs with task=mine."
        )
    if task.name in READ_DATA:
        check_paths(config.data)
        check = getattr(import_module(f"smolvlm_exp.data.sources.{config.data.source}"), "check", None)
        if check:
            check(config.data)
    if task.name == "generate":
        find_questions(task.images, task.question, task.questions)
    if task.name in WITHOUT_MODEL:
        return
    if model.id != "embedded" and not is_hub_id(model.id) and "/" in model.id and not Path(model.id).is_dir():
        raise RequestError(f"model.id={model.id}: there is no such folder, and it is no name of the Hub (OWNER/NAME).")
    if model.adapter and not is_hub_id(model.adapter):
        find_adapter(config.adapter, model.adapter)


def check_paths(data: DataConfig) -> None:
    folders, files = PATHS.get(data.source, ((), ()))
    for key in (*folders, *files):
        value = getattr(data, key)
        path = Path(value or "").expanduser()
        if value and not (path.is_dir() if key in folders else path.is_file()):
            raise RequestError(f"data.{key}={value}: there is no such {'folder' if key in folders else 'file'}.")
