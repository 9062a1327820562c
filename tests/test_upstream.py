"""Every hook of other packages that we use and that they do not promise to keep: a new release fails here first.

Functions with the names of their parameters, or an operator's arguments, as we call or override them ("..." where what
follows is not ours); then attributes by class, whose module, or a base class's, has to name them. A failure says which
of our files use the hook.
"""

import inspect
import pkgutil
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import smolvlm_exp

HYDRA = "hydra._internal"
TRAINER = "transformers:Trainer"
LLAMA, IDEFICS, SMOLVLM = (
    f"transformers.models.{name}.modeling_{name}" for name in ("llama", "idefics3", "smolvlm")
)  # fmt: skip
FUNCTIONS = [  # hook, its parameters, and the word to find our uses by where its own name is too common
    (f"{TRAINER}.get_batch_samples", "self epoch_iterator num_batches device"),
    (f"{TRAINER}.training_step", "self model inputs num_items_in_batch"),
    (f"{TRAINER}.prediction_step", "self model inputs prediction_loss_only ignore_keys"),
    (f"{TRAINER}.get_train_dataloader", "self"),
    (f"{TRAINER}.get_eval_dataloader", "self eval_dataset"),
    (f"{TRAINER}.log", "self logs start_time", "flush_metrics"),
    (f"{TRAINER}.compute_loss_context_manager", "self"),
    (f"{TRAINER}.create_model_card", "self ..."),
    (f"{TRAINER}._set_signature_columns_if_needed", "self"),
    (f"{TRAINER}._get_num_items_in_batch", "self batch_samples device"),
    (f"{TRAINER}._get_grad_norm", "self model grad_norm"),
    (f"{TRAINER}._run_epoch", "self ..."),
    (f"{TRAINER}._get_output_dir", "self trial"),
    (f"{TRAINER}._save", "self output_dir state_dict"),
    (f"{TRAINER}._save_checkpoint", "self model trial"),
    (f"{TRAINER}._save_optimizer_and_scheduler", "self output_dir"),
    (f"{TRAINER}._save_rng_state", "self output_dir"),
    (f"{TRAINER}._load_from_checkpoint", "self resume_from_checkpoint model"),
    (f"{TRAINER}._load_optimizer_and_scheduler", "self checkpoint"),
    (f"{TRAINER}._load_rng_state", "self checkpoint"),
    (f"{TRAINER}._finalize_training", "self ..."),
    (f"{TRAINER}._load_best_model", "self"),
    ("transformers.integrations.integration_utils:rewrite_logs", "d"),
    ("wandb:Run._log_artifact", "self artifact_or_path ..."),
    ("transformers:AttentionInterface.register", "key value", "AttentionInterface"),
    ("transformers.masking_utils:AttentionMaskInterface.register", "key value", "AttentionMaskInterface"),
    ("transformers:DynamicCache", "ddp_cache_data ..."),
    (f"{LLAMA}:LlamaDecoderLayer.forward",
     "self hidden_states attention_mask position_ids cache use_cache position_embeddings kwargs", "FusedTextLayer"),
    *((f"{module}EncoderLayer.forward", "self hidden_states attention_mask kwargs", "FusedVisionLayer")
      for module in (f"{IDEFICS}:Idefics3", f"{SMOLVLM}:SmolVLM")),
    *((f"{module}.forward", "self pixel_values patch_attention_mask", "patch_attention_mask")
      for module in (f"{IDEFICS}:Idefics3VisionEmbeddings", f"{SMOLVLM}:SmolVLMVisionEmbeddings")),
    ("transformers.activations:GELUTanh.forward", "self input", "GELUTanh"),
    ("trl:DPOTrainer._compute_loss", "self model inputs return_outputs"),
    ("trl:DPOTrainer.compute_ref_log_probs", "self model inputs"),
    ("trl:SFTTrainer.compute_loss", "self model inputs return_outputs num_items_in_batch"),
    ("trl.kernels:ChunkedLogProbFunction.forward",
     "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs",
     "ChunkedLogProbFunction"),
    ("trl.trainer.utils:FusedCausalLMOutput",
     "loss log_probs entropy log_sum_sq_probs mean_logits is_top1 label_mask aux_loss"),
    ("trl.trainer.utils:disable_dropout_in_model", "model"),
    ("trl.trainer.dpo_trainer:DataCollatorForVisionPreference", "processor max_length ..."),
    ("peft.tuners.lora.dora:DoraLinearLayer.forward",
     "self x lora_A lora_B scaling base_layer base_result adapter_name", "DoraLinearLayer"),
    ("peft.tuners.lora.variants:DoraLinearVariant.forward", "module active_adapter x result kwargs",
     "DoraLinearVariant"),
    ("transformers:Idefics3Processor.get_processor_dict", "pretrained_model_name_or_path kwargs"),
    ("transformers:Idefics3Processor.from_args_and_dict", "args processor_dict kwargs"),
    ("transformers.utils:cached_file", "path_or_repo_id filename kwargs"),
    ("bitsandbytes.functional:dequantize_blockwise", "A quant_state ..."),
    (f"{HYDRA}.utils:create_config_search_path", "search_path_dir"),
    (f"{HYDRA}.utils:get_args_parser", ""),
    (f"{HYDRA}.hydra:Hydra.create_main_hydra2", "task_name config_search_path"),
    (f"{HYDRA}.config_repository:ConfigRepository", "config_search_path"),
    (f"{HYDRA}.core_plugins.basic_sweeper:BasicSweeper._parse_config", "self"),
    (f"{HYDRA}.core_plugins.basic_launcher:BasicLauncher.launch", "self job_overrides initial_job_idx",
     "BasicLauncher"),
    (f"{HYDRA}.config_loader_impl:ConfigLoaderImpl.load_sweep_config", "self master_config sweep_overrides"),
    ("torch._utils:_flatten_dense_tensors", "tensors"),
    ("torch._utils:_take_tensors", "tensors size_limit"),
    ("torch._utils:_unflatten_dense_tensors", "flat tensors"),
    ("torch.optim.optimizer:register_optimizer_step_post_hook", "hook"),
    ("torch.overrides:TorchFunctionMode.__torch_function__", "self func types args kwargs", "__torch_function__"),
]  # fmt: skip
OPERATORS = {
    "aten._flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
    "return_debug_mask scale ... -> output softmax_logsumexp rng_state unused debug_attn_mask",
    "aten._flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k "
    "dropout_p is_causal rng_state unused scale ... -> 3",
    "aten._efficient_attention_forward": "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    "dropout_p custom_mask_type compute_log_sumexp scale ... -> output logsumexp philox_seed philox_offset "
    "max_seqlen_batch_q max_seqlen_batch_k",
    "aten._efficient_attention_backward": "grad_out_ query key value bias out cu_seqlens_q cu_seqlens_k max_seqlen_q "
    "max_seqlen_k logsumexp dropout_p philox_seed philox_offset custom_mask_type bias_requires_grad scale ... -> 4",
    "aten._scaled_dot_product_cudnn_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal "
    "return_debug_mask scale -> output logsumexp cum_seq_q cum_seq_k max_q max_k philox_seed philox_offset "
    "debug_attn_mask",
    "aten._scaled_dot_product_cudnn_attention_backward": "grad_out query key value out logsumexp philox_seed "
    "philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k dropout_p is_causal scale -> 3",
    "aten._foreach_copy_": "self src non_blocking -> 0",
    "bitsandbytes.dequantize_4bit": "A absmax blocksize quant_type shape dtype -> 1",
}
ATTRIBUTES = {
    TRAINER: "_tr_loss _total_loss_scalar _globalstep_last_logged _signature_columns",
    "transformers:TrainingArguments": "_n_gpu",
    "transformers:PreTrainedConfig": "_attn_implementation",
    "transformers:PreTrainedTokenizerFast": "_tokenizer",
    f"{LLAMA}:LlamaRMSNorm": "variance_epsilon",
    "trl:DPOTrainer": "_metrics _total_train_tokens maybe_activation_offload_context precompute_ref_logps ref_model "
    "ld_alpha use_weighting",
    "trl:SFTTrainer": "_metrics _total_train_tokens maybe_activation_offload_context",
    "peft.tuners.lora:LoraLayer": "lora_A lora_B lora_magnitude_vector lora_variant lora_bias lora_dropout use_dora",
    "peft.tuners.tuners_utils:BaseTunerLayer": "base_layer",
    "peft.utils.other:AuxiliaryTrainingWrapper": "original_module",
    "bitsandbytes.nn:Int8Params": "CB SCB",
    "bitsandbytes.nn:Linear8bitLt": "state threshold",
    "bitsandbytes.functional:QuantState": "absmax code blocksize quant_type dtype shape offset state2 nested",
    "accelerate.data_loader:DataLoaderAdapter": "base_dataloader",
    "accelerate.utils:FullyShardedDataParallelPlugin": "mixed_precision_policy",
    "torch.optim:Adam": "found_inf",
    "optuna.trial:FrozenTrial": "_trial_id",
    f"{HYDRA}.config_loader_impl:ConfigLoaderImpl": "repository get_group_options",
}
SOURCE = {path: path.read_text(encoding="utf-8") for path in Path(smolvlm_exp.__file__).parent.rglob("*.py")}


def users(word: str) -> list[str]:
    """Our files that name `word`."""
    root = Path(smolvlm_exp.__file__).parent.parent
    return [str(path.relative_to(root)) for path, text in SOURCE.items() if re.search(rf"\b{re.escape(word)}\b", text)]


def resolve(hook: str):
    pytest.importorskip(hook.partition(":")[0].partition(".")[0])
    return pkgutil.resolve_name(hook)


def check(hook: str, expected: str, actual: list[str], word: str) -> None:
    files = users(word)
    assert files, f"nothing of ours uses {hook} any more: take it out of this table"
    names = expected.split()
    if names[-1:] == ["..."]:
        names, actual = names[:-1], actual[: len(names) - 1]
    assert actual == names, f"{hook} takes ({', '.join(actual)}), not ({', '.join(names)}): look at {', '.join(files)}"


@pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: row[0].rpartition(":")[2])
def test_functions_take_what_we_give(row):
    hook, expected, *word = row
    actual = list(inspect.signature(resolve(hook)).parameters)
    check(hook, expected, actual, word[0] if word else re.split(r"[.:]", hook)[-1])


@pytest.mark.parametrize("hook", OPERATORS)
def test_operators_take_and_give_what_we_expect(hook):
    pytest.importorskip("bitsandbytes")
    module, name = hook.split(".")
    schema = getattr(getattr(torch.ops, module), name).default._schema
    takes, gives = OPERATORS[hook].split(" -> ")
    check(hook, takes, [argument.name for argument in schema.arguments], name)
    results = [result.name for result in schema.returns]
    assert gives in (" ".join(results), str(len(results))), f"{hook} gives {results}: look at {users(name)}"


@cache
def code(kind: type) -> str:
    """The modules of a class and of those it is made of."""
    modules = {sys.modules[base.__module__] for base in kind.__mro__}
    files = [Path(getattr(module, "__file__", None) or "") for module in modules]
    return "".join(file.read_text(encoding="utf-8") for file in files if file.suffix == ".py")


@pytest.mark.parametrize(
    ("hook", "name"), [(hook, name) for hook, names in ATTRIBUTES.items() for name in names.split()]
)
def test_attributes_are_there(hook, name):
    files = users(name)
    assert files, f"nothing of ours uses {name} of {hook} any more: take it out of this table"
    assert re.search(rf"\b{name}\b", code(resolve(hook))), f"{hook} has no {name}: look at {', '.join(files)}"
