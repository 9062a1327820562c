"""Is what was exported what was tuned? Both score and answer the same held-out rows, each by what really runs it."""

from dataclasses import dataclass
from typing import Any

from smolvlm_exp.deploy.export.options import ExportConfig
from smolvlm_exp.evaluation.checks import Check, mean_logp_change, require
from smolvlm_exp.evaluation.held_out import Evaluation
from smolvlm_exp.evaluation.statistics import Change

SURE = 0.05  # p below which a change of generated answers counts
WORSE = {"chair_s": ("increase", 1), "yes_no_accuracy": ("drop", -1)}  # the direction in which a metric is worse


@dataclass(frozen=True)
class Parity:
    rows: int
    error: float  # nats a token by which answers are scored otherwise than by the tuned model, whichever way
    effect: float | None  # nats a token by which the adapter changed them; None without one
    tuned: float  # preference accuracy
    exported: float

    @property
    def share(self) -> float:
        """The error over the adapter's own effect; without an adapter, the error."""
        return self.error / self.effect if self.effect else self.error

    def in_words(self) -> str:
        of = f", {self.share:.3f} of what the adapter changed" if self.effect else ""
        return (
            f"answers' log-probability off by {self.error:.2g} nats a token{of}; preference accuracy "
            f"{self.tuned:.3f} tuned, {self.exported:.3f} exported; {self.rows} held-out rows"
        )


def parity(tuned: Evaluation, exported: Evaluation, effect: float | None) -> Parity:
    assert tuned.logps is not None
    assert exported.logps is not None
    accuracies = (each.metrics["preference_accuracy"] for each in (tuned, exported))
    return Parity(len(tuned.logps.chosen), mean_logp_change(tuned.logps, exported.logps), effect, *accuracies)


def gate(config: ExportConfig, found: Parity, changes: dict[str, Change]) -> list[Check]:
    """A `fail` among them holds the export back.

    Args:
        changes: from the tuned model's metrics to the exported one's; empty while nothing was generated.
    """
    drop, unit = found.tuned - found.exported, "share of the adapter's effect" if found.effect else "nats/token"
    checks = [
        require("accuracy_drop", "preference accuracy drop, tuned to exported", drop, "<=", config.max_drop),
        require("logprob_error", f"mean error of answer log-prob ({unit})", found.share, "<=", config.max_error),
    ]
    for name, (word, direction) in WORSE.items():
        if name in changes:
            change = changes[name]
            worse = direction * change.difference if change.p < SURE else 0.0
            label = f"{name} {word}, tuned to exported (0 unless p < {SURE})"
            checks.append(require(f"{name}_{word}", label, worse, "<=", config.max_drop))
    return checks


def facts(found: Parity) -> dict[str, Any]:
    """As export.json has them."""
    return {**vars(found), "share": found.share}
