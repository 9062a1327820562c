"""Settings by the names that TRL, transformers, PEFT, LLaMA-Factory and people give them -> what to type here."""

from smolvlm_exp.utils.errors import suggestion

NAMES = {  # what to type here -> other names
    "trainer.learning_rate": "lr",
    "trainer.num_train_epochs": "epochs num_epochs n_epochs",
    "trainer.max_steps": "steps num_steps",
    "trainer.per_device_train_batch_size": "batch_size bs bsz train_batch_size micro_batch_size",
    "trainer.per_device_eval_batch_size": "eval_batch_size",
    "trainer.gradient_accumulation_steps": "ga grad_accum gradient_accumulation",
    "trainer.warmup_steps, below 1 a share": "warmup warmup_ratio",
    "trainer.optim": "optimizer",
    "trainer.weight_decay": "wd",
    "trainer.extra, as +trainer.extra.adam_beta2=0.95": "adam_beta1 adam_beta2 adam_epsilon adam_eps",
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
    "model.attn_implementation": "attention attn flash_attn flash_attention",
    "model.longest_edge": "resolution image_resolution image_size",
    "data, as data=hub data.id=OWNER/NAME": "dataset dataset_name dataset_id",
    "data, as data=files data.folder=FOLDER": "data_path data_dir image_folder",
    "data.rows, with data=files data.folder=FOLDER": "data_file data_files train_file",
    """data.train, as 'data.train="train[:1000]"'""": "max_samples max_train_samples num_samples",
    "data.max_length": "max_seq_length max_seq_len cutoff_len",
    "hydra.run.dir": "output_dir out_dir save_dir output",
    "name": "run_name experiment_name",
    "tracker, as tracker=wandb, tensorboard, trackio or none": "report_to logger use_wandb",
    "tracker.project": "project wandb_project",
    "resume, as resume=last": "resume_from_checkpoint checkpoint",
    "export.push_to_hub, with task=export": "hub_model_id",
    "CUDA_VISIBLE_DEVICES in the environment": "device gpu gpus cuda gpu_id gpu_ids",
    "accelerate launch --num_processes N -m smolvlm_exp": "num_gpus n_gpu ngpus num_processes",
    "HF_TOKEN in the environment": "hub_token hf_token use_auth_token",
    "seed": "random_seed seed_everything",
}
CHOSEN_BY_GROUP = ("task.name", "data.source", "trainer.algorithm")  # by task=..., data=..., trainer=...
MEANT = {name: meant for meant, names in NAMES.items() for name in names.split()}


def setting_meant(key: str, known: list[str]) -> str:
    """A sentence about what an unknown setting may have meant; empty where nothing is near."""
    typed = key.lower().replace("-", "_")
    squeezed = {name.replace("_", ""): meant for name, meant in MEANT.items()}  # batchsize
    names = (typed.replace(".", "_"), typed.rpartition(".")[2])  # model.name as model_name
    meant = next((found for name in names if (found := MEANT.get(name) or squeezed.get(name))), None)
    if meant:
        return f"Here it is {meant}."
    return suggestion(key, [name for name in known if not key.startswith(f"{name}.") and name not in CHOSEN_BY_GROUP])
