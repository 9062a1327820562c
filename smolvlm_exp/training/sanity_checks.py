"""Sanity checks of a training run: what moved, what did not, and the first loss."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from smolvlm_exp.engine.fingerprint import content_hash
from smolvlm_exp.evaluation.checks import Check, require
from smolvlm_exp.utils.distributed import full_tensor

LN2 = math.log(2)
NAMED = 3  # tensors that a check names
MOVES = ("parameters_moved", "magnitudes_moved", "parameters_with_gradient", "policy_changed")  # ids of checks


class ParameterMonitor:
    """Keeps a copy of a model's trainable tensors and a hash of the frozen ones, and compares them after training."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # An adapter has to move even where it was frozen by mistake; TRL's copy of its start is ".ref".
        self.start = {
            name: on_host(parameter).clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad or ("lora_" in name and ".default" in name)
        }
        self.frozen = frozen_hash(model)

    def checks(self, trainer: Any) -> list[Check]:
        trained = {name: parameter for name, parameter in self.model.named_parameters() if name in self.start}
        unmoved = [name for name, p in trained.items() if torch.equal(self.start[name], on_host(p))]
        magnitudes = [name for name in trained if "magnitude" in name]
        checks = [share_check("parameters_moved", "trainable tensors that moved (share)", trained, unmoved)]
        if magnitudes:
            checks.append(share_check("magnitudes_moved", "DoRA magnitudes that moved (share)", magnitudes, unmoved))
        zero = without_gradient(trained, trainer.optimizer)
        if zero is not None:
            name = "trainable tensors that got a gradient (share)"
            checks.append(share_check("parameters_with_gradient", name, trained, zero))
        unchanged = torch.equal(frozen_hash(self.model), self.frozen)
        checks.append(require("base_unchanged", "frozen weights unchanged", unchanged, ">=", 1))
        return [*checks, *first_step_checks(trainer)]


def excuse_short_run(checks: Sequence[Check], trainer: Any) -> list[Check]:
    """A run of fewer than two steps at a rate above 0 cannot say what moves: LoRA's A waits until B has left 0."""
    warming_up = trainer.args.get_warmup_steps(trainer.state.max_steps) > 0  # it begins at the rate 0
    steps = max(trainer.state.global_step - warming_up, 0)
    if steps >= 2:
        return list(checks)
    detail = f"too short to say: {steps} step{'s' * (steps != 1)} at a learning rate above 0"
    return [
        replace(check, verdict="warn", detail=detail) if check.id in MOVES and check.verdict == "fail" else check
        for check in checks
    ]


def on_host(parameter: torch.Tensor) -> torch.Tensor:
    return full_tensor(parameter).detach().float().cpu()


def share_check(id: str, name: str, of: Collection[str], missing: list[str]) -> Check:
    missing = [tensor for tensor in missing if tensor in of]
    detail = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
    return require(id, name, 1 - len(missing) / max(len(of), 1), ">=", 1, detail=f"not {detail}")


def without_gradient(trained: dict[str, Any], optimizer: Any) -> list[str] | None:
    """The tensors whose every gradient was zero, from Adam's second moments; None where the optimizer has none."""
    states = getattr(optimizer, "optimizer", optimizer).state
    moments = {name: states.get(parameter, {}).get("exp_avg_sq") for name, parameter in trained.items()}
    if not any(isinstance(moment, torch.Tensor) for moment in moments.values()):
        return None
    return [name for name, moment in moments.items() if moment is None or not full_tensor(moment).any()]


def first_step_checks(trainer: Any) -> list[Check]:
    """Before its first step the policy is the reference, so DPO's loss is ln 2 (arXiv 2305.18290, eq. 7)."""
    first: dict[str, Any] = next((e for e in trainer.state.log_history if "loss" in e and e["step"] == 1), {})
    tolerance, checks = (5e-3 if trainer.args.bf16 or trainer.args.fp16 else 1e-4), []
    if "rewards/chosen" in first:
        off = max(abs(first["rewards/chosen"]), abs(first["rewards/rejected"]))
        checks.append(require("reference_at_start", "policy minus reference at step 1 (reward)", off, "<=", tolerance))
    if first and getattr(trainer, "loss_types", None) == ["sigmoid"]:
        checks.append(require("first_loss_ln2", "first loss minus ln 2", abs(first["loss"] - LN2), "<=", tolerance))
    return checks


def frozen_hash(model: nn.Module) -> torch.Tensor:
    """Of the bytes of all frozen parameters, computed on their device."""
    return content_hash([parameter for parameter in model.parameters() if not parameter.requires_grad])
