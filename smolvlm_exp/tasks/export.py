"""task=export: a run's adapter in formats that run elsewhere, each measured by its own backend before it is written.

python -m smolvlm_exp task=export run=last export.format=onnx export.precision=int8
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.deploy.export.merge import load_merged, save_merged
from smolvlm_exp.deploy.export.model_card import card_data, model_card, published_name
from smolvlm_exp.deploy.export.onnx_export import Graphs
from smolvlm_exp.deploy.export.parity import Parity, gate, parity
from smolvlm_exp.deploy.export.record import check_free, read_record, write_record
from smolvlm_exp.deploy.options import PARTS_BY_SIZE, formats, merged_precision, precisions, require_packages
from smolvlm_exp.deploy.session.backends import OnnxModel, load_folder
from smolvlm_exp.engine.fingerprint import weights_key
from smolvlm_exp.evaluation.checks import checks_passed, mean_logp_change
from smolvlm_exp.evaluation.held_out import Evaluation, HeldOut, evaluate
from smolvlm_exp.evaluation.own_pairs import own_pairs
from smolvlm_exp.evaluation.preference import preference_metrics
from smolvlm_exp.evaluation.statistics import changes
from smolvlm_exp.models.adapter import saved_adapter
from smolvlm_exp.models.model import ModelConfig, load_finetuned_model, load_processor
from smolvlm_exp.models.resolution import Resolution
from smolvlm_exp.reporting.summary import print_results, summarize
from smolvlm_exp.runs.checkpoint import atomic_folder
from smolvlm_exp.runs.find import summary_of
from smolvlm_exp.runs.folder import lock_run_folder
from smolvlm_exp.tasks.hub import check_account, upload
from smolvlm_exp.tasks.provenance import provenance
from smolvlm_exp.utils.errors import RequestError, RunError, isolated
from smolvlm_exp.utils.files import read_json, write_json
from smolvlm_exp.utils.hub import Provenance
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.versions import versions

log = logging.getLogger(__name__)


def export(config: Config, folder: Path) -> dict[str, Path]:
    """Write each requested format into a folder of its own; returns these folders by format.

    Raises:
        RequestError: a setting that cannot work; nothing was written.
        RunError: a format failed the parity gate. Those before it are written.
    """
    root = Path(config.export.folder or Path(config.run or folder) / "export")
    folders = {name: root / name for name in formats(config.export)}
    for target in folders.values():
        check_free(target)
    if "adapter" in folders and not config.model.adapter:
        raise RequestError("export.format=adapter: there is no adapter; set run=FOLDER or model.adapter=FOLDER.")
    packages = dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export") if "onnx" in folders else {}
    if "merged" in folders and merged_precision(config.export) == "int8":
        packages["torchao"] = "int8"
    require_packages("export", packages)
    sources = provenance(config)
    if config.export.push_to_hub:
        card = card_data(asdict(config), list(folders)[-1], sources).to_yaml()
        repository = check_account("export.push_to_hub", config.export.push_to_hub, card)
        config = replace(config, export=replace(config.export, push_to_hub=repository))
    with lock_run_folder(root):
        before = weight_files(config.model)
        exporter = Exporter(config, folder, sources)
        for name, target in folders.items():
            with atomic_folder(target) as staging:
                getattr(exporter, f"write_{name}")(staging, target)
                check_free(target)  # again: writing takes minutes, and what is there now is about to be replaced
                if weight_files(config.model) != before:
                    raise RunError(
                        f"{config.run or config.model.adapter} changed while {name} was exported (is it being trained "
                        "further?), so it was not written. Export again when that has ended."
                    )
            log.info(f"written: {relative_to_cwd(target)}")
    if config.export.push_to_hub:
        upload(target, config.export.push_to_hub, config.export.private)
    return folders


def weight_files(model: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """The local files that a model and its adapter are read from, more than once; a resumed run replaces them."""
    folders = [Path(name) for name in (model.id, model.adapter) if name and Path(name).is_dir()]
    states = {path: path.stat() for folder in folders for path in folder.glob("*") if path.is_file()}
    return {path: (state.st_ino, state.st_mtime_ns, state.st_ctime_ns) for path, state in states.items()}


class Exporter:
    """One tuned model with its held-out rows, and how each format is written."""

    def __init__(self, config: Config, folder: Path, sources: Mapping[str, Provenance]) -> None:
        self.config, self.sources = config, sources
        self.processor = load_processor(config.model)
        if not Resolution.of(self.processor.image_processor.to_dict()).upscale:
            log.warning(
                "WARNING: only this program reads model.upscale=false from an export: transformers, vLLM, "
                "transformers.js and others enlarge small images, to more tiles than in training. The card says so."
            )
        preferences = load_preferences(config.data, self.processor, folder, splits=("test",))
        batch_size = config.trainer.per_device_eval_batch_size
        held_out = HeldOut(preferences, self.processor, batch_size, config.data.max_length)
        sampling: dict[str, Any] = {"seed": config.seed, "max_new_tokens": config.task.max_new_tokens}
        self.run = summary_of(Path(config.run)) if config.run else {}
        model = load_finetuned_model(config.model, config.quant, config.adapter, config.seed)
        self.own_pairs = "chosen" not in preferences.test.column_names
        pairs = own_pairs(model, held_out, config.data, **sampling) if self.own_pairs else held_out
        self.score = pairs.logps
        self.evaluate = lambda model: evaluate(model, held_out, pairs=pairs, **sampling)
        self.tuned: Evaluation = self.evaluate(model)
        self.effect: float | None = None
        if config.model.adapter:  # by how much it changed the answers' log-probabilities
            assert self.tuned.logps is not None
            with model.disable_adapter():
                self.effect = mean_logp_change(self.score(model), self.tuned.logps)

    def parity(self, model: Any) -> Parity:
        """From log-probabilities only: nothing is generated."""
        logps = self.score(model)
        return parity(self.tuned, Evaluation(preference_metrics(logps), logps, []), self.effect)

    @cached_property
    def merged(self) -> Any:
        config = self.config
        model = load_merged(config.model, config.quant, config.adapter, config.seed, config.export.merge)
        if config.model.adapter:
            log.info(f"merged into the {config.export.merge} base: {self.parity(model)}")
        return model

    def write_adapter(self, staging: Path, target: Path) -> None:
        """As PEFT reads it: `tuned` was loaded from the same file, so it is its own parity."""
        assert self.config.model.adapter is not None
        source = saved_adapter(self.config.adapter, self.config.model.adapter, self.config.model.id)
        shutil.copy(source / "adapter_model.safetensors", staging)
        base = {"base_model_name_or_path": published_name(self.sources["model"])}
        write_json(staging / "adapter_config.json", {**read_json(source / "adapter_config.json"), **base})
        self.processor.save_pretrained(staging)
        self.finish(staging, "adapter", {}, self.tuned)
        if self.config.adapter.use_dora:
            log.info("adapter: vLLM and llama.cpp cannot load DoRA; use export.format=merged for them")

    def write_merged(self, staging: Path, target: Path) -> None:
        precision = merged_precision(self.config.export)
        save_merged(self.merged, self.processor, staging, precision)
        self.finish(staging, "merged", {"model": precision}, self.evaluate(load_folder(staging, None)[0].model))

    def write_onnx(self, staging: Path, target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=staging.parent, prefix=".graphs.") as work:
            graphs = Graphs(Path(work), self.merged.cpu(), self.processor)

            chosen = self.search(graphs) if self.config.export.search else precisions(self.config.export)
            graphs.copy_to(staging, chosen)
        weights = weights_key(self.merged)
        if read_record(target).get("weights") == weights:  # keep the graphs of this model in other precisions
            for file in (target / "onnx").iterdir():
                if not (staging / "onnx" / file.name).exists():
                    shutil.copy(file, staging / "onnx")
        self.finish(staging, "onnx", chosen, self.evaluate(OnnxModel(staging, chosen)), weights=weights)

    def search(self, graphs: Graphs) -> dict[str, str]:
        """The smallest precisions that pass the gate, part by part: at most two trials each."""
        chosen = dict.fromkeys(PARTS_BY_SIZE, "fp32")
        for part in PARTS_BY_SIZE:
            for precision in ("int4", "int8"):
                if graphs.size({part: precision}) >= graphs.size({part: "fp32"}):
                    continue
                trial = {**chosen, part: precision}
                measured = self.parity(OnnxModel(graphs.folder, trial))
                passed = checks_passed(gate(self.config.export, measured, {}))
                size = f"{graphs.size(trial) / 2**20:.1f} MiB"
                log.info(f"search: {listed(trial)}: {size}; {measured}: {'passes' if passed else 'fails'}")
                if passed:
                    chosen = trial
                    break
        return chosen

    def finish(self, staging: Path, form: str, chosen: dict[str, str], exported: Evaluation, **more: Any) -> None:
        """Print and check how good an export is, and write its card and its record."""
        measured = parity(self.tuned, exported, self.effect)
        checks = gate(self.config.export, measured, changes(self.tuned.ratios, exported.ratios))
        summary = summarize(self.tuned, exported, checks)
        print(f"{form}{f' ({listed(chosen)})' if chosen else ''}: {measured}")
        print_results(summary, names=("tuned", "exported"), tuned=False)
        if not checks_passed(checks):
            if self.config.export.on_fail == "refuse":
                raise RunError(
                    f"{form} failed the parity gate (`fail` above) and was not written. Use another export.precision, "
                    "export.search=true, or export.on_fail=mark to write it anyway."
                )
            log.warning(f"WARNING: {form} failed the parity gate; written anyway (export.on_fail=mark)")
        content = {
            "format": form,
            "precisions": chosen,
            "model": published_name(self.sources["model"]),
            "merge": self.config.export.merge if self.config.model.adapter else None,
            "resolution": asdict(Resolution.of(self.processor.image_processor.to_dict())),
            "pairs": "own_answers" if self.own_pairs else "data",
            "parity": asdict(measured),
            "tuned": self.tuned.metrics,
            "exported": exported.metrics,
            "intervals": {"tuned": summary["intervals"]["before"], "exported": summary["intervals"]["after"]},
            "changes": summary["changes"],
            "passes": summary["checks_passed"],
            "checks": summary["checks"],
            "versions": versions(),
            **more,
        }
        with isolated("README.md"):
            card = model_card(asdict(self.config), content, self.run, self.sources)
            (staging / "README.md").write_text(card, encoding="utf-8")
        write_record(staging, content)


def listed(precisions: dict[str, str]) -> str:
    return ", ".join(f"{part} {precision}" for part, precision in precisions.items())
