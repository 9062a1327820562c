"""Did it really train? Cheap facts about a run that is easy to believe and hard to see."""

import math
from typing import Any

import torch
from torch import nn

LN2 = math.log(2)


class Watch:
    """Remembers a model's trainable tensors and a checksum of the frozen ones, and says later what became of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.start = {n: p.detach().float().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.base = checksum(model)

    def checks(self, trainer: Any) -> list[dict[str, Any]]:
        """(name, value, threshold, verdict) of each check, as summary.json has them."""
        moved = [
            not torch.equal(self.start[name], parameter.detach().float().cpu())
            for name, parameter in self.model.named_parameters()
            if name in self.start
        ]
        share = sum(moved) / max(len(moved), 1)
        kept = checksum(self.model) == self.base
        checks = [
            verdict("trainable tensors that moved", share, "1.0", share == 1),
            verdict("frozen weights unchanged", float(kept), "1.0", kept),
        ]
        first: dict[str, Any] = next((e for e in trainer.state.log_history if "loss" in e and e["step"] == 1), {})
        tolerance = 5e-3 if trainer.args.bf16 else 1e-4
        if "rewards/chosen" in first:
            off = max(abs(first["rewards/chosen"]), abs(first["rewards/rejected"]))
            checks.append(verdict("policy minus reference at step 1", off, f"{tolerance:g}", off <= tolerance))
        if first and getattr(trainer, "loss_types", None) == ["sigmoid"]:
            off = abs(first["loss"] - LN2)
            checks.append(verdict("first loss minus ln 2", off, f"{tolerance:g}", off <= tolerance))
        return checks


def verdict(name: str, value: float, threshold: str, ok: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "threshold": threshold, "verdict": "ok" if ok else "fail"}


def checksum(model: nn.Module) -> int:
    """A sum over the bytes of the frozen parameters: any changed weight changes it, save for a conspiracy."""
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().contiguous().view(torch.uint8).flatten()
            total += int(flat.sum(dtype=torch.int64))
    return total
