"""What each task reads: a `Config` of its own under `task.*`, and the groups that no other task reads.

They are here and not in `tasks/` so that a command can be checked before torch is imported.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from smolvlm_exp.utils.fields import above, at_least, one_of

READERS = {
    "export": ("export",), "serve": ("serve",), "session": ("chat", "serve"), "runs": ("compare",),
    "reward": ("train", "evaluate", "mine"),
}  # fmt: skip


@dataclass
class Task:
    name: str = MISSING  # the module in smolvlm_exp/tasks


@dataclass
class Train(Task):
    max_new_tokens: int = at_least(1, 256, most=65536)  # of an answer; longer ones are cut


@dataclass
class Export(Train):
    """Of the answers that the parity gate compares."""


@dataclass
class Chat(Task):
    temperature: float = at_least(0, 0.0)  # of sampling; 0: greedy


@dataclass
class Evaluate(Chat, Train):
    batch_sizes: list[int] = field(default_factory=list)  # to time; []: 1 and trainer.per_device_eval_batch_size


@dataclass
class Generate(Chat, Train):
    images: str | None = None  # the folder of images
    question: str = "Describe the picture."  # asked about each image
    questions: str | None = None  # or a JSONL file with `image` and `question` per line
    answers: str | None = None  # the JSONL file to write or complete; null: answers.jsonl in the run's folder


@dataclass
class Mine(Train):
    """Pairs out of answers that are sampled from the model and scored by the group `reward`.

    The folder then has `pairs.jsonl`, which `data=files data.folder=FOLDER` reads, and the images in `images/`; with
    rounds each `round-N/` has them, beside the run that was trained on them, and the folder has the last adapter.
    """

    num_generations: int = at_least(2, 8)  # answers to each row
    temperature: float = above(0, 1.0)  # of sampling
    pairs_per_row: int = at_least(1, 2)  # at most
    margin: float = above(0, 0.5)  # of reward between chosen and rejected, at least
    rejected: str = one_of(
        "likeliest", "worst"
    )  # of the answers below the margin, first those that the model is surest of
    max_length_ratio: float = at_least(1, 3.0)  # of the longer answer's tokens to the shorter one's
    rounds: int = at_least(0, 0)  # of mining and then training on what was mined; 0: mine alone
    push_to_hub: str | None = None  # a dataset repository, as you/pairs; uploaded once everything is written
    private: bool = True  # where that repository is created


@dataclass
class Plan(Task):
    """The card to plan for, and what is assumed of data that is not on this disk."""

    card: str | None = None  # rtx4060, t4, h100 ...; null: this machine's, without a GPU a choice of them
    image_size: str = "512x384"  # width x height of most images; the largest are taken to be square
    answer_tokens: int = at_least(1, 100)  # of most answers; the longest are taken to be twice as long
    rows: int | None = at_least(1, None)  # of the data set, where they are not known


@dataclass
class Preview(Task):
    rows: int = at_least(1, 8)  # so many of the first


TASKS: dict[str, type[Task]] = {
    "train": Train, "evaluate": Evaluate, "generate": Generate, "compare": Task, "export": Export, "chat": Chat,
    "serve": Task, "doctor": Task, "plan": Plan, "mine": Mine, "preview": Preview, "runs": Task,
}  # fmt: skip


def readers(key: str) -> tuple[str, ...]:
    """The tasks that read a setting; empty: all of them, or there is no such setting."""
    group, _, name = key.partition(".")
    if group == "task":
        tasks = tuple(task for task, config in TASKS.items() if name in config.__dataclass_fields__)
        return () if len(tasks) == len(TASKS) else tasks
    return READERS.get(group, ())


def misplaced(key: str, task: str) -> str:
    """Where a setting belongs that `task` does not read, as an error message; empty where it does."""
    tasks = readers(key)
    if not tasks or task in tasks:
        return ""
    return f"{key} belongs to task={'|'.join(tasks)}, and this is task={task}."
