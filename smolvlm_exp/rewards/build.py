"""The rewards of a run: built from the group `reward`, tried on a row, computed and added up."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from numbers import Real
from typing import Any

from smolvlm_exp.data.preferences import Preferences
from smolvlm_exp.data.vocabulary import Vocabulary, Words
from smolvlm_exp.rewards.attributes import attributes
from smolvlm_exp.rewards.completions import Conversation, Reward, Scores
from smolvlm_exp.rewards.config import RewardConfig
from smolvlm_exp.rewards.exact_match import exact_match
from smolvlm_exp.rewards.format import compiled
from smolvlm_exp.rewards.format import format as format_reward
from smolvlm_exp.rewards.image_dependence import image_dependence
from smolvlm_exp.rewards.judge import Judge
from smolvlm_exp.rewards.length import checked, length
from smolvlm_exp.rewards.number import number
from smolvlm_exp.rewards.objects import objects
from smolvlm_exp.rewards.repetition import repetition
from smolvlm_exp.rewards.user import load_user
from smolvlm_exp.rewards.yes_no import yes_no
from smolvlm_exp.utils.errors import RequestError, first_line, suggestion

ENTRY_POINTS = "smolvlm_exp.rewards"  # by which an installed package offers rewards of its own
BUILDERS: dict[str, Callable[[RewardConfig, Words], Reward]] = {
    "exact_match": lambda config, words: exact_match,
    "yes_no": lambda config, words: yes_no,
    "number": lambda config, words: number,
    "objects": lambda config, words: partial(objects, words=words),
    "attributes": lambda config, words: partial(attributes, words=words),
    "repetition": lambda config, words: partial(repetition, words=words),
    "format": lambda config, words: partial(format_reward, pattern=compiled(config.format)),
    "length": lambda config, words: partial(length, config=checked(config.length)),
    "image_dependence": lambda config, words: image_dependence,
    "judge": lambda config, words: Judge(config.judge),
}
ASK_THE_MODEL = ("image_dependence",)
UNTRIED = (*ASK_THE_MODEL, "judge")  # which needs the network


@dataclass(frozen=True)
class Rewards:
    functions: dict[str, Reward]  # name -> what TRL calls; its __name__ is the name
    weights: dict[str, float]
    aggregation: str  # TRL's multi_objective_aggregation
    hashes: dict[str, str]  # SHA-256 of a person's own files, by the reward's name

    def score(
        self,
        prompts: Sequence[Conversation],
        completions: Sequence[Conversation],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> dict[str, Scores]:
        """Each reward of each completion.

        Args:
            columns: the data set's other columns, one value per completion.

        Raises:
            RequestError: a reward returned something else than a number or None for each completion.
        """
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        return {
            name: checked_scores(name, function(**given), len(completions)) for name, function in self.functions.items()
        }

    def score_answers(
        self, prompts: Sequence[Any], answers: Sequence[str], ids: Sequence[list[int]], truth: Sequence[str | None]
    ) -> tuple[dict[str, Scores], Scores]:
        """As evaluation's `Scorer`: of answers to held-out rows, by the rewards that do not ask the model."""
        completions = [[{"role": "assistant", "content": answer}] for answer in answers]
        functions = {name: function for name, function in self.functions.items() if name not in ASK_THE_MODEL}
        scores = replace(self, functions=functions).score(prompts, completions, ids, truth=list(truth))
        return scores, self.total(scores)

    def total(self, scores: Mapping[str, Scores]) -> Scores:
        """Of each completion the weighted sum of the rewards that concern it; None where none does."""
        return [
            sum(self.weights[name] * score for name, score in row.items()) if row else None
            for row in (
                {name: score for name, score in zip(scores, values, strict=True) if score is not None}
                for values in zip(*scores.values(), strict=True)
            )
        ]


def build_rewards(config: RewardConfig, words: Words | None) -> Rewards:
    """The rewards that have a weight, and the person's own.

    Args:
        words: reads the objects out of a caption; None: no row says what is in its image.

    Raises:
        RequestError: there is no such reward, or its settings cannot work.
    """
    words = words or Vocabulary({})
    functions = {name: named(name, build(name, config, words)) for name in config.weights}
    weights, hashes = dict(config.weights), dict[str, str]()
    if config.user:
        name, function, sha256 = load_user(config.user)
        if name in functions or name in BUILDERS:
            raise RequestError(f"reward.user={config.user}: there is a reward {name} already. Rename the function.")
        functions[name], weights[name], hashes[name] = named(name, function), config.user_weight, sha256
    return Rewards(functions, weights, config.multi_objective_aggregation, hashes)


def build(name: str, config: RewardConfig, words: Words) -> Reward:
    """One of `BUILDERS`, or what an installed package offers under this name."""
    if name in BUILDERS:
        return BUILDERS[name](config, words)
    installed = entry_points(group=ENTRY_POINTS)
    if name not in installed.names:
        known = [*BUILDERS, *sorted(installed.names)]
        raise RequestError(f"reward.weights.{name}: there is no such reward. {suggestion(name, known)}")
    try:
        function: Reward = installed[name].load()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RequestError(f"reward.weights.{name}: the package that offers it cannot be loaded ({reason}).") from error
    return function


def named(name: str, function: Reward) -> Reward:
    """The function under its reward's name: TRL logs it so, and looks through a `partial` for it."""
    if getattr(function, "__name__", None) == name:
        return function

    def reward(*args: Any, **columns: Any) -> Scores:
        return function(*args, **columns)

    reward.__name__ = name
    return reward


def checked_rewards(config: RewardConfig, preferences: Preferences) -> Rewards:
    """The rewards for these rows, each tried on one of them that something is known about.

    Raises:
        RequestError: nothing is known about any, or as of `build_rewards` and `check`.
    """
    rows = preferences.train if len(preferences.train) else preferences.test
    truths = rows["truth"][:] if "truth" in rows.column_names else []
    first = next((i for i, truth in enumerate(truths) if truth), None)
    if first is None:
        raise RequestError(
            "No row says what is true of its image, so rewards have nothing to compare answers with. Rows need one of "
            "answer, objects, caption, truth (docs/rewards.md)."
        )
    rewards = build_rewards(config, preferences.words)
    check(rewards, {"prompt": rows[first]["prompt"], "truth": truths[first]})
    return rewards


def check(rewards: Rewards, row: Mapping[str, Any]) -> None:
    """Try every reward that needs neither the model nor the network on a row, before the model is loaded.

    Args:
        row: `prompt` and the data's other columns, `truth` among them where there is one.

    Raises:
        RequestError: there is no reward, or one fails or returns what is no reward; the message names it.
    """
    if not rewards.functions:
        raise RequestError("reward.weights is empty: choose rewards, as reward=truth or +reward.weights.length=0.1.")
    answer = plausible_answer(row.get("truth"))
    completions = [[{"role": "assistant", "content": answer}]]
    columns = {name: [value] for name, value in row.items() if name not in ("prompt", "completion", "completion_ids")}
    for name, function in rewards.functions.items():
        if name in UNTRIED:
            continue
        try:
            scores = function(prompts=[row["prompt"]], completions=completions, completion_ids=[[0]], **columns)
            checked_scores(name, scores, 1)
        except RequestError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise RequestError(f"the reward {name} fails on the answer {answer!r} to a row ({reason}).") from error


def plausible_answer(truth: str | None) -> str:
    """What somebody could say who knows the truth."""
    known = json.loads(truth) if truth else {}
    said = known.get("answer", known.get("objects", known.get("caption", "yes")))
    return ", ".join(map(str, said)) if isinstance(said, list) else str(said)


def checked_scores(name: str, scores: Any, count: int) -> Scores:
    """The scores. Raises RequestError unless they are as many numbers or Nones as there are completions."""
    if not isinstance(scores, list) or len(scores) != count:
        what = f"a list of {len(scores)}" if isinstance(scores, list) else type(scores).__name__
        raise RequestError(f"the reward {name} returned {what}; it must return a list of {count}, one per completion.")
    wrong = next((s for s in scores if s is not None and not (isinstance(s, Real) and math.isfinite(s))), None)
    if wrong is not None:
        raise RequestError(
            f"the reward {name} returned {wrong!r}; it must return finite numbers, or None for a completion that it "
            "leaves out."
        )
    return scores
