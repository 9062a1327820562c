"""The group `reward`: which rewards count how much."""

from dataclasses import dataclass, field

from smolvlm_exp.rewards.format import FormatConfig
from smolvlm_exp.rewards.judge import JudgeConfig
from smolvlm_exp.rewards.length import LengthConfig
from smolvlm_exp.utils.fields import one_of


@dataclass
class RewardConfig:
    weights: dict[str, float] = field(default_factory=dict)  # reward -> its weight; 0: computed and logged alone
    multi_objective_aggregation: str = one_of("sum_then_normalize", "normalize_then_sum")  # TRL's; the latter is GDPO
    user: str | None = None  # a reward of your own, as FILE.py:FUNCTION; typed with the command, not from a file
    user_weight: float = 1.0
    format: FormatConfig = field(default_factory=FormatConfig)
    length: LengthConfig = field(default_factory=LengthConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
