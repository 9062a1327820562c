"""The identity of a run, saved in its checkpoints, and whether a resumed run is the same one."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.tokens import processor_digests
from smolvlm_exp.runs.checkpoint import step_of
from smolvlm_exp.runs.find import PAIRED
from smolvlm_exp.runs.overrides import flatten
from smolvlm_exp.utils.distributed import rank_world
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import read_json
from smolvlm_exp.utils.hub import Provenance
from smolvlm_exp.utils.versions import versions

if TYPE_CHECKING:
    from datasets import Dataset

    from smolvlm_exp.data.preferences import Preferences

log = logging.getLogger(__name__)

IDENTITY = "run.json"  # in a checkpoint
ROWS, BASE = "data.rows", "model.base"  # the keys of the training rows' and of the base's digest
TRUTH = "data.truth"  # of what rewards score sampled answers by
HELD_OUT = "data.held_out"  # of the held-out rows, where they decide which checkpoint is the result, or when it ends
COMMITS = ("model.commit", "data.commit")  # on the Hub
PROCESSOR = {  # the keys of the digests of its parts, and what to call them
    "model.tokenizer": "the tokenizer", "model.chat_template": "the chat template",
    "model.image_processor": "the way images are read",
}  # fmt: skip
CODE = "reward.code"  # of the digest of each file with a person's own rewards
WORDS = "reward.words"  # of the digest of the data's vocabulary, by which rewards read captions
GENERATION = "model.generation_config"  # of what upstream's `generate` reads beside its arguments
ATTENTION = "model.attention"  # what model.attn_implementation=auto is on this machine
GPU = "gpu"  # its name
BEST = ("trainer.load_best_model_at_end", "trainer.metric_for_best_model", "trainer.early_stopping_patience")
COLUMNS = ("images", "prompt", "chosen", "rejected", "truth")
# Keys that a run of an earlier release has not recorded.
LATER = (*COMMITS, TRUTH, HELD_OUT, WORDS, GENERATION, ATTENTION, GPU, *BEST)
ON_HUB = ("rlaif_v", "rlhf_v")  # of earlier releases, each a source of its own
UNREAD = ("transformers_version", "_from_model_config")  # of a generation config
# Settings that do not change what is learned: paths, what is saved, tracking, workers.
RESUME_FREE_KEYS = (
    "task", "export", "session", "serve", "tracker", "name", "keep", "keep_checkpoints", "metric", "strict_checks",
    "resume", "resume_allow", "run", "runs", "sweep", "data.num_proc", "data.revision", "model.revision",
    "trainer.cache", "trainer.cache_disk", "trainer.cache_ram", "trainer.dataloader_num_workers",
    "trainer.memory_budget", "trainer.not_finite_limit", "trainer.sample_steps", "trainer.save_steps",
    "trainer.save_strategy", "trainer.save_total_limit",
)  # fmt: skip
BATCH_KEYS = ("processes", "trainer.gradient_accumulation_steps")  # their product is what counts
VERSION_KEYS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "pillow")  # that may change them


def check_same_run(
    settings: Mapping[str, Any],
    checkpoint: Path | None,
    rows: "Preferences | None" = None,
    model: Any = None,
    rewards: Mapping[str, str | None] | None = None,
    processor: Any = None,
    sources: Mapping[str, Provenance] | None = None,
) -> dict[str, Any]:
    """This run's identity, as full name -> value.

    Args:
        settings: the full configuration, as nested dictionaries.
        checkpoint: the one to resume from.
        rows: to train on and to evaluate; not compared while None.
        model: as loaded, with the adapter that it starts from; not compared while None.
        rewards: key -> digest of the files that rewards are made from; not compared while None.
        processor: as loaded; not compared while None.
        sources: of the model and the data, whose commits are compared in place of the revisions that were asked for.

    Raises:
        RequestError: the checkpoint is another run's; it says what differs.
    """
    import torch

    here = learned_settings(settings)
    here |= {f"versions.{name}": version for name, version in versions().items() if name in VERSION_KEYS}
    here.pop(ROWS, None)  # data=files has a setting of this name: which file holds the rows, whose digest says more
    here["processes"] = rank_world()[1]
    here["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if here["device"] == "cuda":
        here[GPU] = torch.cuda.get_device_name()
    if rows is not None:
        here[ROWS] = digest(rows.train)
        trainer = settings["trainer"]
        if trainer["algorithm"] not in PAIRED and "truth" in rows.train.column_names:
            here[TRUTH] = digest(rows.train, ("truth",))
        if trainer["load_best_model_at_end"] or trainer["early_stopping_patience"] is not None:
            here[HELD_OUT] = digest(rows.test, [name for name in COLUMNS if name in rows.test.column_names])
    if model is not None:
        from smolvlm_exp.engine.fingerprint import weights_key

        here[BASE] = weights_key(model, "default" if settings["model"]["adapter"] else None)
        generation = model.generation_config.to_diff_dict()
        here[GENERATION] = {key: value for key, value in generation.items() if key not in UNREAD}
        here[ATTENTION] = model.config._attn_implementation
    here |= {f"{name}.commit": source.commit for name, source in (sources or {}).items() if source.commit}
    if processor is not None:
        here |= {f"model.{part}": digest for part, digest in processor_digests(processor).items()}
    here |= rewards or {}
    if checkpoint is not None:
        if settings["trainer"]["extra"].get("sync_ref_model"):
            raise RequestError(
                f"resume={settings['resume']}: trainer.extra.sync_ref_model moves the reference, and no checkpoint "
                "holds where it was. Start again in another folder."
            )
        saved = read_json(checkpoint / IDENTITY)
        if not saved:
            raise RequestError(
                f"{checkpoint} has no {IDENTITY} that can be read, so nobody can say which run it is of."
            )
        if rewards is None:
            saved = {key: value for key, value in saved.items() if not key.startswith((CODE, WORDS))}
        refuse_changes(under_new_names(saved, here), here, settings, step_of(checkpoint))
    return here


def learned_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Full name -> value of those settings that decide what is learned."""
    free = (*RESUME_FREE_KEYS, *(("reward",) if settings["trainer"]["algorithm"] in PAIRED else ()))
    flat = flatten({key: value for key, value in settings.items() if key not in free})
    return {key: value for key, value in flat.items() if key not in RESUME_FREE_KEYS and value != {}}


def under_new_names(saved: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """A saved identity in which `model.shape.longest_edge`, which counted for random weights, has its new name, and
    sources of data from the Hub have theirs: what they read, the rows' digest says.
    """
    if saved.get("data.source") in ON_HUB:
        saved = {**saved, "data.source": "hub", "data.test_fraction": here.get("data.test_fraction")}
    old = saved.pop("model.shape.longest_edge", None)
    if old and saved["model.weights"] == "random" and here["model.longest_edge"]:
        return {**saved, "model.longest_edge": old}
    return saved


def refuse_changes(saved: dict[str, Any], here: dict[str, Any], settings: Mapping[str, Any], step: int) -> None:
    before, now = (math.prod(side.get(key, 1) for key in BATCH_KEYS) for side in (saved, here))
    samples = settings["trainer"]["algorithm"] not in PAIRED
    draws = samples or (here.get("trainer.disable_dropout") is False and here.get("adapter.lora_dropout"))
    # Another number of processes may take the same rows per step, where none of them draws random numbers.
    skipped = {*(BATCH_KEYS if before == now and not draws else ()), *({ROWS, BASE, *PROCESSOR} - here.keys())}
    skipped |= {key for key in LATER if key not in saved or key not in here}
    if settings["model"]["id"] == "embedded":  # whose tokenizer earlier releases read as this one does
        skipped |= PROCESSOR.keys() - saved.keys()
    changes: dict[str, str] = {}
    said, says = ({key: value for key, value in side.items() if value not in ([], {})} for side in (saved, here))
    for key in [key for key in saved | here if said.get(key) != says.get(key) and key not in skipped]:
        change = describe_change(key, saved, here)
        if any(key == allowed or key.startswith(f"{allowed}.") for allowed in settings["resume_allow"]):
            log.info(f"resume: {change}, accepted by resume_allow")
        else:
            changes[key] = change
    if not changes:
        return
    lines = [f"  {change}" for change in changes.values()]
    if "processes" in changes and samples:
        lines.append("Each process keeps the answers that it has sampled, so there have to be as many of them.")
    elif "processes" in changes:
        steps, rest = divmod(before, here["processes"])
        lines.append(
            f"A step's rows cannot be divided among {here['processes']} processes."
            if rest
            else f"With trainer.gradient_accumulation_steps={steps} and no dropout, a step has the same rows here."
        )
    listed = "\n".join(lines)
    raise RequestError(
        f"resume={settings['resume']}: this is not the run that was saved at step {step}.\n"
        f"{listed}\nUndo the change, or accept it with 'resume_allow=[{','.join(changes)}]'."
    )


def describe_change(key: str, saved: dict[str, Any], here: dict[str, Any]) -> str:
    if key == ROWS:
        return "data.rows: the training rows or their images have changed"
    if key == TRUTH:
        return f"{key}: the truth of the training rows has changed, by which answers are scored"
    if key == HELD_OUT:
        return f"{key}: the held-out rows have changed, which decide what the best checkpoint is"
    if key == BASE:
        return "model.base: the weights that the run starts from have changed"
    if key == WORDS:
        return f"{key}: the words that name objects have changed, by which rewards read captions"
    if key in PROCESSOR:
        if key in saved:
            return f"{key}: {PROCESSOR[key]} has changed"
        return f"{key}: the run did not record {PROCESSOR[key]}; it began when tokenizers of Idefics3 split no digits"
    if key.startswith(CODE):
        name = key.removeprefix(f"{CODE}.")
        return f"{key}: the file with the reward {name} is not the one that the run began with"
    if key in COMMITS:
        revision = key.replace("commit", "revision")
        return f"{key} was {saved[key]} and is {here[key]}; {revision}={saved[key]} takes the first again"
    before, now = (json.dumps(side[key]) if key in side else "not set" for side in (saved, here))
    return f"{key} was {before} and is {now}"


def digest(rows: "Dataset", columns: Sequence[str] = ()) -> str:
    """A hash of the rows' images and texts, in order; of their truth, where they have no answers.

    Args:
        columns: of these alone.
    """
    import xxhash

    hasher = xxhash.xxh3_128()
    learned = [side for side in ("chosen", "rejected") if side in rows.column_names] or ["truth"]
    for batch in rows.select_columns([*(columns or ("images", "prompt", *learned))]).with_format("arrow").iter(256):
        for row in batch.to_pylist():
            for image in row.pop("images", None) or []:
                hasher.update(image["bytes"] or str(image["path"]).encode())
            hasher.update(json.dumps(row, sort_keys=True).encode())
    return hasher.hexdigest()
