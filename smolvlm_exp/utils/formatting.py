"""Numbers, durations and names as people read them."""

import math
import re
from collections.abc import Sequence
from typing import Any

NBSP = "\u00a0"
MINUS = "\u2212"


def number(value: float) -> str:
    """About four significant digits: 0.6931, 1,234, 5e-4 (with a true minus sign)."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 1e-3 or size >= 1e7:
        digits, exponent = f"{value:.2e}".split("e")
        text = f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        decimals = max(0, 3 - math.floor(math.log10(size)))
        text = f"{value:,.{decimals}f}"
        if decimals:
            text = text.rstrip("0").rstrip(".")
    return text.replace("-", MINUS)


def percent(value: float, decimals: int = 0) -> str:
    """A fraction of 1 -> "57 %"."""
    if not math.isfinite(value):
        return number(value)
    text = f"{100 * value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS) + NBSP + "%"


def humanize(key: Any) -> str:
    """An identifier as words, reward_accuracy -> reward accuracy; anything else as it is."""
    text = str(key)
    return text.replace("_", " ") if text.isidentifier() and text.islower() else text


def as_float(value: Any) -> float | None:
    """The number, nan and infinities too, or None for anything that is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # JSON has integers of any length
        return math.inf


def as_finite(value: Any) -> float | None:
    """The number, or None for anything that is not a finite one."""
    number = as_float(value)
    return number if number is not None and math.isfinite(number) else None


def duration(seconds: float) -> str:
    """38.2 s, 4 min 07 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def between(low: float, high: float) -> str:
    """A range to two significant digits: 0.026 to 0.041, 12 to 15."""
    digits = max(0, 1 - math.floor(math.log10(low))) if low > 0 else 0
    ends = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return " to ".join(dict.fromkeys(ends))


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Full key -> its last part (`adapter.r` -> `r`), or the full key where two end alike."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: end if last.count(end) == 1 else key for key, end in zip(keys, last, strict=True)}


def short_value(value: str) -> str:
    """A value as typed, a long number to four digits."""
    number = parse_number(value)
    return f"{number:.4g}" if isinstance(number, float) and len(value) > 8 else value


def parse_number(value: str) -> Any:
    """A value as typed -> a number where it is one."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def printable(text: str) -> str:
    r"""Somebody's text for a terminal, which would obey its control characters: \\x1b in place of an escape."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)
