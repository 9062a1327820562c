"""Is what was exported what was tuned? Both score and answer the same held-out rows, each by what really runs it."""

from dataclasses import dataclass
from typing import Any

from smolvlm_exp.deploy.export.options import ExportConfig
from smolvlm_exp.evaluation.checks import Check, mean_logp_change, require_at_most
from smolvlm_exp.evaluation.held_out import Evaluation
from smolvlm_exp.evaluation.statistics import Change

SURE = 0.05  # p below which a change of generated answers counts
WORSE = {"chair_s": 1, "yes_no_accuracy": -1}  # the direction in which a metric is worse


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
    off = "of what the adapter changed" if found.effect else "nats a token"
    checks = [
        require_at_most(
            "fall of preference accuracy, tuned to exported", found.tuned - found.exported, config.max_drop
        ),
        require_at_most(f"answers' log-probability off by, {off}", found.share, config.max_error),
    ]
    for name, direction in WORSE.items():
        if name in changes:
            change = changes[name]
            worse = direction * change.difference if change.p < SURE else 0.0
            checks.append(require_at_most(f"{name}, worse by (where p < {SURE})", worse, config.max_drop))
    return checks


def passes(checks: list[Check]) -> bool:
    return all(check.verdict != "fail" for check in checks)


def facts(found: Parity) -> dict[str, Any]:
    """As export.json has them."""
    return {**vars(found), "share": found.share}
