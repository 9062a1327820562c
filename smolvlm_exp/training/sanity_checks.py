"""Did it really train? Cheap facts about a run that is easy to believe and hard to see."""

import math
from typing import Any

import torch
from torch import nn

from smolvlm_exp.evaluation.checks import Check, require
from smolvlm_exp.utils.distributed import full_tensor

LN2 = math.log(2)
NAMED = 3  # tensors that a check names


class ParameterMonitor:
    """Remembers a model's trainable tensors and a checksum of the frozen ones, and says later what became of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.start = {
            n: on_host(p).clone() for n, p in model.named_parameters() if p.requires_grad or is_adapter_parameter(n)
        }
        self.base = checksum(model)

    def checks(self, trainer: Any) -> list[Check]:
        learnt = {name: parameter for name, parameter in self.model.named_parameters() if name in self.start}
        still = [name for name, p in learnt.items() if torch.equal(self.start[name], on_host(p))]
        checks = [check_all_moved("parameters_moved", "trainable tensors that moved (share)", still, len(learnt))]
        magnitudes = [name for name in learnt if "magnitude" in name]
        if magnitudes:
            named = [name for name in still if "magnitude" in name]
            checks.append(
                check_all_moved("magnitudes_moved", "DoRA magnitudes that moved (share)", named, len(magnitudes))
            )
        without = without_gradient(learnt, trainer.optimizer)
        if without is not None:
            name = "trainable tensors that got a gradient (share)"
            checks.append(check_all_moved("parameters_with_gradient", name, without, len(learnt)))
        checks.append(require("base_unchanged", "frozen weights unchanged", checksum(self.model) == self.base, ">=", 1))
        return [*checks, *first_step_checks(trainer)]


def is_adapter_parameter(name: str) -> bool:
    """Whether a tensor belongs to the adapter that is tuned: it has to move even where it was frozen by mistake."""
    return "lora_" in name and ".default" in name  # TRL's copy of the start is ".ref"


def on_host(parameter: torch.Tensor) -> torch.Tensor:
    return full_tensor(parameter).detach().float().cpu()


def check_all_moved(id: str, name: str, missing: list[str], count: int) -> Check:
    detail = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
    return require(id, name, 1 - len(missing) / max(count, 1), ">=", 1, detail=f"not {detail}")


def without_gradient(learnt: dict[str, Any], optimizer: Any) -> list[str] | None:
    """The tensors whose every gradient was zero, from Adam's second moments; None where the optimiser has none."""
    states = getattr(optimizer, "optimizer", optimizer).state
    moments = {name: states.get(parameter, {}).get("exp_avg_sq") for name, parameter in learnt.items()}
    if not any(isinstance(each, torch.Tensor) for each in moments.values()):
        return None
    return [name for name, each in moments.items() if each is None or not full_tensor(each).any()]


def first_step_checks(trainer: Any) -> list[Check]:
    """Before its first step the policy is the reference, so DPO's loss is ln 2 (arXiv 2305.18290, eq. 7)."""
    first: dict[str, Any] = next((e for e in trainer.state.log_history if "loss" in e and e["step"] == 1), {})
    tolerance, checks = (5e-3 if trainer.args.bf16 else 1e-4), []
    if "rewards/chosen" in first:
        off = max(abs(first["rewards/chosen"]), abs(first["rewards/rejected"]))
        checks.append(require("reference_at_start", "policy minus reference at step 1 (reward)", off, "<=", tolerance))
    if first and getattr(trainer, "loss_types", None) == ["sigmoid"]:
        checks.append(require("first_loss_ln2", "first loss minus ln 2", abs(first["loss"] - LN2), "<=", tolerance))
    return checks


def checksum(model: nn.Module) -> int:
    """A sum over the bytes of the frozen parameters: any changed weight changes it, save for a conspiracy."""
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            flat = full_tensor(parameter).detach().contiguous().view(torch.uint8).flatten()
            total += int(flat.sum(dtype=torch.int64))
    return total
