"""Cards by name: what their data sheets say (cards.yaml), and how fast the engine may be expected to run on them."""

import difflib
import os
import re
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import yaml

from smolvlm_exp.engine.memory.footprint import MemorySpec
from smolvlm_exp.engine.memory.roofline import Card
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.gpu import AMPERE
from smolvlm_exp.utils.paths import PACKAGE
from smolvlm_exp.utils.units import GIB

FILE = PACKAGE / "engine" / "memory" / "cards.yaml"
CONTEXT = 0.6  # GiB of a card that the driver and CUDA take before anything else
# Shares of a data sheet's product rate and bandwidth that are reached, at worst and at best: cards that a power limit
# slows (T4, L4) and such that run above their rated clock (GeForce). On the two measured cards cards.yaml has them.
WORST, BEST = (0.55, 0.6), (0.95, 0.8)
SPREAD = 0.05  # of the measured cards' shares, between hosts and runs
HOSTS = 38e-6, 75e-6  # seconds to start a kernel, on the fastest and the slowest host measured
PASSES_REACH = 0.76  # of the bandwidth of one long copy, by passes of ops.py


@dataclass(frozen=True)
class CardSheet:
    """A card of cards.yaml; its units are there."""

    key: str
    name: str
    memory: float
    tflops: float
    bandwidth: float
    capability: float
    source: str
    reached: tuple[float, float] | None = None  # shares of tflops and bandwidth, where that was measured

    @property
    def usable(self) -> int:
        """Bytes that a process gets."""
        return int((self.memory - CONTEXT) * GIB)

    @property
    def compute_capability(self) -> tuple[int, int]:
        return int(self.capability), round(10 * self.capability) % 10

    @property
    def has_kernels(self) -> bool:
        return has_kernels(self.compute_capability)

    def expected(self) -> Card:
        return self.card(self.reached or mean_of(WORST, BEST), Card.launch)

    def bounds(self) -> tuple[Card, Card]:
        """At best and at worst, card and host."""
        worst, best = WORST, BEST
        if self.reached:
            worst, best = (mean_of([share * factor for share in self.reached]) for factor in (1 - SPREAD, 1 + SPREAD))
        return self.card(best, HOSTS[0]), self.card(worst, HOSTS[1])

    def card(self, shares: tuple[float, float], launch: float) -> Card:
        text, vision = attention_shares(self.compute_capability)
        matmul, bandwidth = shares[0] * self.tflops * 1e12, shares[1] * self.bandwidth * 1e9
        return Card(self.name, matmul, bandwidth, text, vision, launch, self.has_kernels)

    def adjusted(self, spec: MemorySpec) -> MemorySpec:
        """`spec` as it is on this card: below capability 8.0 in float16, which is as large, and without kernels."""
        return replace(spec, triton=self.has_kernels)


def mean_of(*shares: Any) -> tuple[float, float]:
    first, second = (sum(values) / len(values) for values in zip(*shares, strict=True))
    return first, second


def has_kernels(capability: tuple[int, int]) -> bool:
    """bfloat16, Triton's kernels and flash attention: from Ampere on."""
    return capability >= AMPERE


def attention_shares(capability: tuple[int, int]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of a product's rate, by attention over text and in the vision tower, each forward and backward.

    Flash attention 2 reaches as much of an A100 as of an H100, and cuDNN more of the latter; SDPA without either less.
    """
    if (9, 0) <= capability < (10, 0):
        return (0.2, 0.215), (0.38, 0.28)
    share = (0.5, 0.42) if has_kernels(capability) else (0.25, 0.2)
    return share, share


@cache
def cards() -> dict[str, CardSheet]:
    saved = read_sheets()["cards"]
    return {
        key: CardSheet(key=key, **{**sheet, "reached": tuple(sheet["reached"]) if "reached" in sheet else None})
        for key, sheet in saved.items()
    }


@cache
def read_sheets() -> Any:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def shown_cards() -> list[CardSheet]:
    """A short list, by memory."""
    return [cards()[key] for key in read_sheets()["shown"]]


def find_card(name: str) -> CardSheet:
    """The card that somebody means: `rtx4060`, `RTX 4060`, `4060`.

    Raises:
        RequestError: there is no such card; it has the nearest names.
    """
    typed = re.sub(r"nvidia|geforce|gpu|[^a-z0-9]", "", name.lower())
    for key in cards():
        if typed in (plain := key.replace("_", ""), plain.removeprefix("rtx")):
            return cards()[key]
    near = difflib.get_close_matches(typed, cards(), n=5, cutoff=0.4) or [card.key for card in shown_cards()]
    raise RequestError(
        f"task.card={name}: no such card. Near: {', '.join(near)}. "
        f"All {len(cards())} are in {FILE.relative_to(PACKAGE.parent)}."
    )


def found_card() -> tuple[str, CardSheet | None] | None:
    """The driver's name of this machine's first GPU, and what the table has of it; None where there is no GPU."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", f"--id={first}", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        name, memory = said.splitlines()[0].rsplit(",", 1)
        size = float(memory) / 1024
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    plain = name.strip().removeprefix("NVIDIA ")
    alike = [card for card in cards().values() if card.name == plain]
    if not alike:
        return plain, None
    return plain, replace(min(alike, key=lambda card: abs(card.memory - size)), memory=size)
