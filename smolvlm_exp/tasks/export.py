"""task=export: a run's adapter as something that runs elsewhere, measured by what runs it before it is handed over.

python -m smolvlm_exp task=export run=last export.format=onnx export.precision=int8
"""

import logging
import shutil
import sys
import tempfile
from dataclasses import asdict
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.deploy.export.hub_upload import check_account, push
from smolvlm_exp.deploy.export.merge import load_merged, save_merged
from smolvlm_exp.deploy.export.model_card import model_card
from smolvlm_exp.deploy.export.options import formats, merged_precision, precisions
from smolvlm_exp.deploy.export.parity import Parity, facts, gate, parity
from smolvlm_exp.deploy.export.record import check_free, read_record, record
from smolvlm_exp.evaluation.checks import checks_passed, mean_logp_change
from smolvlm_exp.evaluation.held_out import Evaluation
from smolvlm_exp.evaluation.held_out import evaluate as look
from smolvlm_exp.evaluation.preference import Logps, answer_logps, preference_metrics
from smolvlm_exp.models.adapter import saved_adapter
from smolvlm_exp.models.model import load_finetuned_model, load_processor
from smolvlm_exp.reporting.summary import print_results, summarize
from smolvlm_exp.runs.checkpoint import atomic_folder
from smolvlm_exp.runs.find import summary_of
from smolvlm_exp.runs.folder import lock_run_folder
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.versions import versions

log = logging.getLogger(__name__)


NEEDS = {"export": ("onnx", "onnxscript", "onnxruntime"), "int8": ("torchao",)}  # by the extra that has them


def export(config: Config, folder: Path) -> dict[str, Path]:
    """Write what `config.export` asks for, each format into a folder of its own.

    Returns:
        Those folders, by format.

    Raises:
        RequestError: something was asked for that cannot be done; nothing was written.
        SystemExit: 1: the gate held one back. Those before it are written.
    """
    wanted = formats(config.export)
    beside = Path(config.run) if config.run else folder
    root = Path(config.export.folder) if config.export.folder else beside / "export"
    for name in wanted:
        check_free(root / name)
    if "adapter" in wanted and not config.model.adapter:
        raise RequestError("export.format=adapter: there is no adapter; give run=FOLDER or model.adapter=FOLDER.")
    require_packages(config, wanted)
    if config.export.push_to_hub:
        check_account(config.export.push_to_hub)
    delivery, written = Exporter(config, folder), {}
    root.mkdir(parents=True, exist_ok=True)
    with lock_run_folder(root):
        for name in wanted:
            with atomic_folder(root / name) as staging:
                getattr(delivery, f"write_{name}")(staging, root / name)
            written[name] = root / name
            log.info(relative_to_cwd(root / name))
    if config.export.push_to_hub:
        log.info(push(written[wanted[-1]], config.export.push_to_hub, config.export.private))
    return written


def require_packages(config: Config, wanted: tuple[str, ...]) -> None:
    """
    Raises:
        RequestError: one is missing.
    """
    in_8_bits = "merged" in wanted and merged_precision(config.export) == "int8"
    for extra, names in NEEDS.items():
        missing = next((name for name in names if find_spec(name) is None), None)
        if missing and (in_8_bits if extra == "int8" else "onnx" in wanted):
            raise RequestError(
                f"task=export needs {missing}, which is not installed: pip install 'smolvlm-exp[{extra}]'"
            )


class Exporter:
    """One tuned model, its held-out rows, and the ways in which it can be written."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.processor = load_processor(config.model)
        self.held_out = load_preferences(config.data, self.processor, folder, splits=("test",))
        self.rows = self.held_out.test
        if "chosen" not in self.rows.column_names:
            raise RequestError(
                f"task=export compares given answers, and data={config.data.source} gives none: use a source of pairs."
            )
        self.batch_size, self.max_length = config.trainer.per_device_eval_batch_size, config.data.max_length
        self.run = summary_of(Path(config.run)) if config.run else {}
        self.tuned, self.effect = self.evaluate_finetuned()

    def evaluate_finetuned(self) -> tuple[Evaluation, float | None]:
        """What the tuned model says of the held-out rows, and by how much its adapter changed that."""
        config = self.config
        model = load_finetuned_model(config.model, config.quant, config.adapter, config.seed)
        tuned = self.evaluate(model)
        assert tuned.logps is not None
        if not self.config.model.adapter:
            return tuned, None
        with model.disable_adapter():
            return tuned, mean_logp_change(self.score(model), tuned.logps)

    def evaluate(self, model: Any) -> Evaluation:
        most, seed = self.config.task.max_new_tokens, self.config.seed
        return look(
            model, self.processor, self.held_out, self.batch_size, self.max_length, seed=seed, max_new_tokens=most
        )

    def score(self, model: Any) -> Logps:
        return answer_logps(model, self.processor, self.rows, self.batch_size, self.max_length)

    def parity(self, model: Any) -> Parity:
        """Of log-probabilities alone: nothing is generated."""
        logps = self.score(model)
        return parity(self.tuned, Evaluation(preference_metrics(logps), logps, []), self.effect)

    @cached_property
    def merged(self) -> Any:
        config, onto = self.config, self.config.export.merge
        model = load_merged(config.model, config.quant, config.adapter, config.seed, onto)
        if self.config.model.adapter:
            log.info(f"merged into the {onto} base: {self.parity(model).in_words()}")
        return model

    def write_adapter(self, staging: Path, target: Path) -> None:
        """As PEFT reads it; it was read back for `tuned`, so that its parity is what loading it gave."""
        assert self.config.model.adapter is not None
        source = saved_adapter(self.config.adapter, self.config.model.adapter)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(source / name, staging / name)
        self.processor.save_pretrained(staging)
        self.finish(staging, "adapter", {}, self.tuned)
        if self.config.adapter.use_dora:
            log.info("adapter: vLLM and llama.cpp load no DoRA; they read the merged folder (export.format=merged)")

    def write_merged(self, staging: Path, target: Path) -> None:
        from smolvlm_exp.deploy.session.load import load_folder

        precision = merged_precision(self.config.export)
        save_merged(self.merged, self.processor, staging, precision)
        self.finish(staging, "merged", {"model": precision}, self.evaluate(load_folder(staging, None)[0].model))

    def write_onnx(self, staging: Path, target: Path) -> None:
        from smolvlm_exp.deploy.export.onnx_export import Graphs, search
        from smolvlm_exp.deploy.session.onnx_backend import OnnxModel
        from smolvlm_exp.engine.fingerprint import weights_key

        with tempfile.TemporaryDirectory(dir=staging.parent, prefix=".graphs.") as work:
            graphs = Graphs(Path(work), self.merged.cpu(), self.processor)

            def holds(tried: dict[str, str]) -> bool:
                found = self.parity(OnnxModel(graphs.folder, tried))
                passed = checks_passed(gate(self.config.export, found, {}))
                told = ", ".join(f"{part} {kind}" for part, kind in tried.items())
                size = f"{graphs.size(tried) / 2**20:.1f} MiB"
                log.info(f"search: {told}: {size}; {found.in_words()}: {'holds' if passed else 'does not'}")
                return passed

            chosen = search(graphs, holds) if self.config.export.search else precisions(self.config.export)
            graphs.place(staging, chosen)
        weights = weights_key(self.merged)
        before = read_record(target)
        if before.get("weights") == weights:  # the same model in other precisions: they stay beside
            for file in (target / "onnx").iterdir():
                if not (staging / "onnx" / file.name).exists():
                    shutil.copy(file, staging / "onnx" / file.name)
        self.finish(staging, "onnx", chosen, self.evaluate(OnnxModel(staging, chosen)), weights=weights)

    def finish(self, staging: Path, form: str, chosen: dict[str, str], exported: Evaluation, **further: Any) -> None:
        """Tell how good it is, hold it back where that is not enough, and write its card and its record."""
        config, found = self.config.export, parity(self.tuned, exported, self.effect)
        changes = exported.changes(self.tuned)
        checks = gate(config, found, changes)
        print(f"{form}{''.join(f', {part} {kind}' for part, kind in chosen.items())}: {found.in_words()}")
        print_results(Console(), summarize(self.tuned, exported, checks), names=("tuned", "exported"))
        if not checks_passed(checks):
            if config.on_fail == "refuse":
                print(
                    f"smolvlm_exp: the gate holds export.format={form} back, and nothing of it was written: see `fail` "
                    "above. Use another precision, export.search=true, or export.on_fail=mark.",
                    file=sys.stderr,
                )
                sys.exit(1)
            log.warning(
                f"THE GATE HOLDS {form} BACK (see `fail` above); it is written with a mark: export.on_fail=mark"
            )
        content = {
            "format": form,
            "precisions": chosen,
            "model": self.config.model.id,
            "merge": self.config.export.merge if self.config.model.adapter else None,
            "parity": facts(found),
            "tuned": self.tuned.metrics,
            "exported": exported.metrics,
            "intervals": {"tuned": self.tuned.intervals(), "exported": exported.intervals()},
            "changes": {name: asdict(change) for name, change in changes.items()},
            "passes": checks_passed(checks),
            "checks": [asdict(check) for check in checks],
            "versions": versions(),
            **further,
        }
        (staging / "README.md").write_text(model_card(asdict(self.config), content, self.run), encoding="utf-8")
        record(staging, content)
