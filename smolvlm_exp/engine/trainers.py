"""TRL's trainers on the engine: the loss and the metrics are TRL's own code, the rows are stock TRL's in its order."""

import logging
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed
from trl import DPOTrainer, SFTTrainer
from trl.trainer.utils import disable_dropout_in_model

from smolvlm_exp.engine.disk_cache import DiskCache
from smolvlm_exp.engine.fingerprint import weights_key
from smolvlm_exp.engine.forward import image_features
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.inputs.micro_batches import Batch
from smolvlm_exp.engine.layers.fuse import fuse
from smolvlm_exp.engine.layers.quantized_weights import keeping_scales
from smolvlm_exp.engine.memory.planner import BATCH_LOSSES
from smolvlm_exp.engine.model_parts import base_of, core_of, is_trainable
from smolvlm_exp.engine.packed_trainer import PackedTrainer
from smolvlm_exp.engine.precompute.reference import reference_logps
from smolvlm_exp.utils.phases import phase

log = logging.getLogger(__name__)


class SharedPrefixDPOTrainer(PackedTrainer, DPOTrainer):
    """DPO on packed pairs. The reference's log-probabilities come with the rows: call `score_references` first.

    Attributes:
        live: the reference is computed with every batch whose rows do not have it.
    """

    def __init__(self, model: Any, **kwargs: Any) -> None:
        placeholder: Any = nn.Identity()  # else TRL builds a second model or a second adapter
        placeholder.config = model.config
        super().__init__(model, ref_model=placeholder, **kwargs)
        self.ref_model: Any = None
        self.precompute_ref_logps = True
        self.batch_loss = bool(BATCH_LOSSES & set(self.loss_types))
        self.live = depends_on_its_batch(model)

    def statistics(self) -> tuple[str, ...]:
        needed = ("log_probs", "entropy", "mean_logits", "is_top1")
        return (*needed, "log_sum_sq_probs") if self.use_weighting else needed

    def loss_of(self, outputs: Any, fields: Batch, num_items_in_batch: Any) -> torch.Tensor:
        return self._compute_loss(lambda **_: outputs, fields, False)

    def score(self, model: nn.Module, batch: Batch) -> tuple[Batch, Any]:
        """The policy and a live reference share the features of a frozen tower."""
        core, packed = core_of(self.model), batch["packed"]
        if self.live and "features" not in packed and not is_trainable(core.vision_model, core.connector):
            tiles = self.on_device({"tiles": packed["tiles"]})["tiles"]
            with torch.no_grad():
                batch = {**batch, "packed": {**packed, "features": image_features(core, self.pixels(tiles))}}
        return super().score(model, batch)

    def reference_of(self, fields: Batch, packed: Batch) -> Batch:
        known = not self.live or "ref_chosen_logps" in fields
        return {} if known else self.reference({**fields, "packed": packed})

    def can_be_live(self) -> bool:
        """Whether the reference stays at hand: the model without its adapter, as long as that began as nothing."""
        return isinstance(self.model, PeftModel) and adds_nothing(self.model) and not self.is_fsdp_enabled

    def reference(self, fields: Batch) -> Batch:
        chosen, rejected = self.compute_ref_log_probs(self.model, fields)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    @phase("reference")
    def score_references(self, store: DiskCache, live: bool = False) -> None:
        """The reference's log-probabilities of all rows, read or computed; before training, when it is the policy.

        A fresh adapter adds nothing, so the reference is the model without it, whose numbers other runs can use.

        Args:
            live: those of the training rows come with every batch instead; see `can_be_live`.
        """
        model = self.model
        assert isinstance(model, nn.Module)
        if depends_on_its_batch(model):
            log.info("reference: recomputed per batch (int8 results depend on the batch)")
            return
        if self.is_fsdp_enabled:
            model.to(self.accelerator.device)
        model.eval()
        fresh = isinstance(model, PeftModel) and adds_nothing(model)
        # With a reference model TRL leaves the adapter on.
        self.ref_model = None if fresh else model
        parts = {
            "weights": weights_key(model, None if fresh else "default"),
            "dtype": str(self.accelerator.mixed_precision),
            "ld_alpha": self.ld_alpha,
            "attention": base_of(model).config._attn_implementation,
            "device": self.args.device.type,
        }
        batch_size, workers = self.args.per_device_eval_batch_size, self.args.dataloader_num_workers
        self.live = live
        for rows in (None if live else self.rows, self.eval_rows):
            if rows is not None:
                rows.reference = reference_logps(rows, self.reference_scores, parts, store, batch_size, workers)
        self.ref_model = None

    def reference_scores(self, batch: Batch, rows: PackedDataset) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference on a batch of `rows`, in parts that fit."""
        (logps,) = self.in_parts(batch, rows, lambda part: (self.reference(self.on_device(part)),))
        return logps["ref_chosen_logps"], logps["ref_rejected_logps"]


class SharedPrefixSFTTrainer(PackedTrainer, SFTTrainer):
    """Supervised fine-tuning on prompt and chosen answer, packed; the mean is over the whole step's tokens."""

    def statistics(self) -> tuple[str, ...]:
        return "log_probs", "entropy", "is_top1"

    def loss_of(self, outputs: Any, fields: Batch, num_items_in_batch: Any) -> torch.Tensor:
        return self.compute_loss(lambda **_: outputs, fields, num_items_in_batch=num_items_in_batch)


def attach_and_fuse(model: Any, peft_config: PeftConfig | None, args: Any) -> Any:
    """The model with its adapter on, its layers fused after it: fusing sets the magnitudes of a fresh DoRA.

    Args:
        peft_config: None where the adapter is on already, or every weight is trained.
        args: the trainer's; activation checkpointing is switched off in it where the fused layers do it themselves.
    """
    if peft_config is not None:
        set_seed(args.seed)  # where TRL would, so that the adapter starts with the same numbers
        with keeping_scales(model):
            model = get_peft_model(model, peft_config)
    if getattr(args, "disable_dropout", False):
        disable_dropout_in_model(model)  # TRL will; an adapter without dropout can be fused
    checkpointing = "full" if args.gradient_checkpointing else "none"
    reasons = fuse(model, checkpointing, checkpointing)
    for reason in reasons:
        log.info(f"engine: {reason}")
    if args.gradient_checkpointing and reasons:
        fuse(model, "none", "none")  # transformers checkpoints every layer or none
    elif args.gradient_checkpointing:
        args.gradient_checkpointing = args.activation_checkpointing = False  # one name and its alias
    return model


def adds_nothing(model: PeftModel) -> bool:
    """Whether every adapter's B is still zero. PiSSA's and OLoRA's never are: they start with a part of the base."""
    return not any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)


def depends_on_its_batch(model: nn.Module) -> bool:
    """LLM.int8 computes a column in 16 bits wherever one row of the batch has an outlier (arXiv 2208.07339)."""
    return any(getattr(getattr(module, "state", None), "threshold", 0.0) > 0.0 for module in model.modules())
