"""Settings by the names that TRL, transformers, PEFT, LLaMA-Factory and people give them -> what to type here."""

from smolvlm_exp.utils.errors import suggestion

NAMES = {  # what to type here -> other names
    "trainer.learning_rate": "lr",
    "trainer.num_train_epochs": "epochs num_epochs",
    "trainer.max_steps": "steps num_steps",
    "trainer.per_device_train_batch_size": "batch_size bs train_batch_size micro_batch_size",
    "trainer.per_device_eval_batch_size": "eval_batch_size",
    "trainer.gradient_accumulation_steps": "ga grad_accum gradient_accumulation",
    "trainer.warmup_steps, below 1 a share": "warmup warmup_ratio",
    "trainer.optim": "optimizer",
    "trainer.lr_scheduler_type": "scheduler lr_scheduler",
    "trainer.max_grad_norm": "grad_clip gradient_clipping",
    "trainer.loss_type, or another trainer, as trainer=rpo": "loss",
    "trainer.beta": "dpo_beta kl_coef",
    "trainer, as trainer=dpo": "algorithm method stage",
    "trainer.dataloader_num_workers, or data.num_proc for preparing rows": "workers num_workers",
    "adapter.r": "rank r lora_r lora_rank",
    "adapter.lora_alpha": "alpha",
    "adapter.lora_dropout": "dropout",
    "adapter.target": "target_modules lora_target",
    "adapter, as adapter=dora, lora or none": "peft peft_type finetuning_type",
    "quant, as quant=nf4": "load_in_4bit 4bit bits quantization",
    "model.dtype, as model.dtype=bfloat16": "bf16 fp16 precision torch_dtype",
    "model.id, or model=smolvlm_256m": "model_name model_id model_name_or_path base_model",
    "model.adapter": "adapter_path adapter_name_or_path peft_model",
    "model.attn_implementation": "attention attn",
    "model.longest_edge": "resolution",
    "data, as data=hub data.id=OWNER/NAME": "dataset dataset_name dataset_id",
    "data, as data=files data.folder=FOLDER": "data_path data_dir image_folder",
    "data.max_length": "max_seq_length max_seq_len cutoff_len",
    "hydra.run.dir": "output_dir out_dir save_dir output",
    "name": "run_name experiment_name",
    "tracker, as tracker=wandb, tensorboard, trackio or none": "report_to logger use_wandb",
    "tracker.project": "project wandb_project",
    "resume, as resume=last": "resume_from_checkpoint checkpoint",
    "export.push_to_hub, with task=export": "hub_model_id",
    "CUDA_VISIBLE_DEVICES in the environment": "device gpu gpus cuda",
}
MEANT = {name: meant for meant, names in NAMES.items() for name in names.split()}


def setting_meant(key: str, known: list[str]) -> str:
    """A sentence about what an unknown setting may have meant; empty where nothing is near."""
    meant = MEANT.get(key.rpartition(".")[2].lower().replace("-", "_"))
    if meant:
        return f"Here it is {meant}."
    return suggestion(key, [name for name in known if not key.startswith(f"{name}.")])
