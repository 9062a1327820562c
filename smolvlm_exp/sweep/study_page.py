"""What a search's page shows in place of main effects: which settings matter, and how the best value came about."""

import warnings
from typing import TYPE_CHECKING

from smolvlm_exp.reporting.charts import bar_chart, line_chart
from smolvlm_exp.reporting.html import empty
from smolvlm_exp.sweep.sweep_page import Sections, paragraph, shower, title_of

if TYPE_CHECKING:
    from optuna import Study


def study_sections(study: "Study", metric: str) -> Sections:
    """Importance (PED-ANOVA, Optuna's default) and history, where enough trials are done."""
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE" and trial.value is not None]
    if len(done) < 2:
        return [("search", "The search", empty("Fewer than two trials are done."))]
    name, better = title_of(metric), max if study.direction.name == "MAXIMIZE" else min
    values = [(trial.number, trial.value) for trial in done if trial.value is not None]
    best = [(number, better(value for _, value in values[: i + 1])) for i, (number, _) in enumerate(values)]
    history = line_chart({"trial": values, "best so far": best}, name, x_label="trial", show=shower(metric))
    pruned = sum(trial.state.name == "PRUNED" for trial in study.trials)
    hint = f"{len(done)} trials ran to their end, {pruned} were pruned."
    charts = f'<div class="charts">{bar_chart(importance(study), "Importance of each setting")}{history}</div>'
    return [("search", "The search", paragraph(hint) + charts)]


def importance(study: "Study") -> dict[str, float]:
    """Setting -> its share in what tells good trials from others; the shares add up to 1."""
    from optuna.importance import get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that trials which are all alike make all settings alike
        return get_param_importances(study)
