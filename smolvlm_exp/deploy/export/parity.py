"""Does an export match the tuned model? Both score and answer the same held-out rows, each by its own backend."""

from dataclasses import dataclass

from smolvlm_exp.deploy.options import ExportConfig
from smolvlm_exp.evaluation.checks import Check, mean_logp_change, require
from smolvlm_exp.evaluation.held_out import Evaluation
from smolvlm_exp.evaluation.statistics import Change

P_VALUE = 0.05  # below which a change of generated answers counts
WORSE = {"chair_s": ("increase", 1), "yes_no_accuracy": ("drop", -1)}  # the direction in which a metric is worse


@dataclass(frozen=True)
class Parity:
    """As export.json has it."""

    rows: int
    error: float  # mean absolute difference of answers' log-probability, exported to tuned, nats/token
    effect: float | None  # the same, base to tuned; None without an adapter
    share: float  # the error over that effect; without an adapter, the error
    tuned: float  # preference accuracy
    exported: float

    def __str__(self) -> str:
        share = f" ({self.share:.3f} of the adapter's effect)" if self.effect else ""
        return (
            f"answer log-prob error {self.error:.2g} nats/token{share}; preference accuracy {self.tuned:.3f} tuned, "
            f"{self.exported:.3f} exported; {self.rows} held-out rows"
        )


def parity(tuned: Evaluation, exported: Evaluation, effect: float | None) -> Parity:
    assert tuned.logps is not None
    assert exported.logps is not None
    error = mean_logp_change(tuned.logps, exported.logps)
    share = error / effect if effect else error
    accuracies = (evaluation.metrics["preference_accuracy"] for evaluation in (tuned, exported))
    return Parity(len(tuned.logps.chosen), error, effect, share, *accuracies)


def gate(config: ExportConfig, parity: Parity, changes: dict[str, Change]) -> list[Check]:
    """The parity gate's checks; an export with a `fail` among them is not written. `changes`: tuned to exported."""
    drop, unit = parity.tuned - parity.exported, "share of the adapter's effect" if parity.effect else "nats/token"
    checks = [
        require("accuracy_drop", "preference accuracy drop, tuned to exported", drop, "<=", config.max_drop),
        require("logprob_error", f"mean error of answer log-prob ({unit})", parity.share, "<=", config.max_error),
    ]
    for name, (word, direction) in WORSE.items():
        if name in changes:
            worse = direction * changes[name].difference if changes[name].p < P_VALUE else 0.0
            label = f"{name} {word}, tuned to exported (0 unless p < {P_VALUE})"
            checks.append(require(f"{name}_{word}", label, worse, "<=", config.max_drop))
    return checks
