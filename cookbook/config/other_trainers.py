"""The keys of other trainers, and the equivalent of each one here.

The keys are those of TRL (SFTConfig, ModelConfig, ScriptArguments and transformers' TrainingArguments),
Unsloth, axolotl, LLaMA-Factory and torchtune. Keys with the same name and meaning here are omitted. A key of
this project is in backticks, with a value if only that value is equivalent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_MODEL = "Use `model_name`"
_FULL = "`lora_rank=0` trains all of the model's weights; any other `lora_rank` trains a LoRA"
_WHERE = "`train_attn`, `train_mlp` and `train_unembed` say which kinds of layers are adapted"
_TARGETS = f"`lora_targets` names layers, or matches them by regular expressions. Otherwise {_WHERE}"
_LAYERS = r"Use `lora_targets` with a regular expression of full names, such as .*\.layers\.[0-7]\..*_proj"
_BATCH = "`batch_size` counts the conversations of an optimizer step; `max_tokens_per_microbatch` cuts it up"
_PACKED = "Sequences always share rows without seeing each other. Remove it"
_PRECISION = "`dtype` is the base model's: auto takes bfloat16 on CUDA and float32 on the CPU"
_TF32 = "How float32 products are computed is not changed here. Remove it"
_QLORA = "`quantization=nf4` holds the base model in 4 bits"
_8BIT = "`quantization=fp8` holds the base model in 8 bits (float8), `quantization=nf4` in 4 bits"
_NF4 = "`quantization=nf4` has its settings fixed: nf4 with double quantization. Remove it"
_ATTENTION = "Attention over packed sequences is chosen by the device. Remove it"
_KERNELS = "Losses are computed without holding all logits; no kernel is chosen by a key. Remove it"
_SHARD = "`shard` says how the processes that torchrun starts hold the base model"
_TEMPLATE = "`renderer_name` names the chat format; chat_template is the tokenizer's own template"
_TRAINED = "`train_on_what` says which messages are trained"
_LENGTH = "Use `max_length`"
_DATASET = "`dataset` is a short name, a hub id or a file; several are separated by commas"
_FORMAT = (
    "`format` says how rows are read, where their keys do not determine it; rename the columns of other rows"
)
_TEST = "`eval_dataset` names data to evaluate on, `test_size` holds out this many rows of `dataset`"
_NUM_TEST = "Use `test_size`, a number of rows"
_PROC = "Use `num_proc`"
_RENDERED = "Rendered data are kept in $COOKBOOK_CACHE by a fingerprint; `use_cache=False` keeps none"
_WEIGHTS = "`weights` are the proportions of several datasets, `stop_when` says when an epoch of them ends"
_SHUFFLED = "Rows are reshuffled in every epoch, from `seed`. Remove it"
_LOADER = "Batches are prepared ahead in a thread. Remove it"
_WARMUP = "Use `warmup_steps`, a number of steps"
_SCHEDULE = "Use `lr_schedule`: linear, cosine or constant"
_ADAMW = (
    "AdamW is the only optimizer: `adam_beta1`, `adam_beta2`, `adam_eps`, `weight_decay`; `optimizer_bits=8` "
    "holds its moments in 8 bits"
)
_ACTIVATIONS = "Use `gradient_checkpointing`: auto, on, off or offload"
_OFFLOAD = "Weights stay on the device. `gradient_checkpointing`, `quantization` and `shard` save memory"
_EVAL = "`eval_every` and `infrequent_eval_every` count steps between evaluations; 0 is off"
_EVAL_BATCH = "Evaluation is cut up by `max_tokens_per_microbatch`. Remove it"
_SAVE = "`save_every` counts steps between checkpoints; 0 saves only the last"
_KEEP = "Use `keep_checkpoints`"
_LOGGED = "Every step is logged. Remove it"
_REPORT_TO = "`wandb_project`, `trackio_project` and `tensorboard`; metrics.jsonl is always written"
_WANDB = "wandb reads it from the environment, as WANDB_ENTITY; keys are `wandb_project` and `wandb_name`"
_RESUME = (
    "The same command in the same `log_path` resumes. `load_checkpoint_path` starts a new run from weights"
)
_PUSH = (
    "Use `push_to_hub` with owner/name. A finished run: "
    "python -m recipes.export checkpoint=... to=hf://owner/name"
)
_EXPORT = "Weights are merged and exported afterwards: python -m recipes.export"
_BEST = "`best_metric` and `best_mode` say which checkpoint is kept as the best"
_DDP = "Processes are started by torchrun, which sets it. Remove it"
_SEED = "Use `seed`"
_SFT = "Only supervised fine-tuning is done. Remove it"
_TRUST = (
    "Code from a model's repository runs only if the environment variable COOKBOOK_TRUST_REMOTE_CODE names "
    "the model. Remove it"
)
_LORA_ONLY = (
    "A new adapter is a plain LoRA or, with `use_rslora`, an rsLoRA. `load_checkpoint_path` also continues "
    "adapters of DoRA. Remove it"
)
_NO_BIAS = "Biases are not trained beside a LoRA. Remove it"
_TOKENS = "`add_tokens` adds tokens, whose embeddings are trained. Those of the tokenizer keep their names"
_SAVED = (
    "`add_tokens` trains the embeddings of single tokens. Other layers are not trained in full beside a new "
    "LoRA; an adapter that has some is continued by `load_checkpoint_path`"
)
_NO_GALORE = "Not supported. `lora_rank` and `quantization=nf4` save memory"
_SAMPLES = "`infrequent_evaluator_builders` hold what is sampled while a model trains"
_NO_NOISE = "Noise on the embeddings is not supported. Remove it"
_COMPILE = "Use `compile`"
_TRACE = "`trace` writes a timeline of the run"
_PREVIEW = "python -m recipes.preview shows what would be trained"

ANSWERS: Mapping[str, str] = {
    # -- the model
    "base_model": _MODEL,
    "base_model_config": _MODEL,
    "base_model_id": _MODEL,
    "model_id": _MODEL,
    "model_name_or_path": _MODEL,
    "model_path": _MODEL,
    "pretrained_model_name_or_path": _MODEL,
    "model": _MODEL,
    "checkpointer": _MODEL,
    "checkpoint_dir": _MODEL,
    "model_type": "The class follows from `model_name`. Remove it",
    "tokenizer_type": "The tokenizer is that of `model_name`. Remove it",
    "tokenizer": "The tokenizer is that of `model_name`. Remove it",
    "tokenizer_name": "The tokenizer is that of `model_name`. Remove it",
    "tokenizer_config": "The tokenizer is that of `model_name`. Remove it",
    "tokenizer_use_fast": "The tokenizer is that of `model_name`. Remove it",
    "use_fast_tokenizer": "The tokenizer is that of `model_name`. Remove it",
    "model_revision": "A revision is pinned by its folder: give that as `model_name`",
    "revision": "A revision is pinned by its folder: give that as `model_name`",
    "trust_remote_code": _TRUST,
    "token": "The hub's token is read from HF_TOKEN, never from a config. Remove it",
    "hub_token": "The hub's token is read from HF_TOKEN, never from a config. Remove it",
    "hf_hub_token": "The hub's token is read from HF_TOKEN, never from a config. Remove it",
    "cache_dir": "The hub's cache is where HF_HOME says. Remove it",
    "rope_scaling": "Positions are the model's own. `max_length` cuts longer examples",
    "special_tokens": _TOKENS,
    "tokens": _TOKENS,
    "eos_token": _TOKENS,
    "pad_token": _TOKENS,
    "resize_vocab": _TOKENS,
    "add_special_tokens": _TOKENS,
    "additional_special_tokens": _TOKENS,
    "new_special_tokens": _TOKENS,
    "new_tokens": _TOKENS,
    "added_tokens_overrides": _TOKENS,
    "model_init_kwargs": "`dtype`, `device` and `quantization` say how a model is loaded",
    # -- precision, memory, kernels
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "bfloat16": _PRECISION,
    "float16": _PRECISION,
    "torch_dtype": _PRECISION,
    "pure_bf16": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "fp16_opt_level": _PRECISION,
    "half_precision_backend": _PRECISION,
    "upcast_layernorm": _PRECISION,
    "upcast_lmhead_output": _PRECISION,
    "fp8": "`quantization=fp8` holds the base model in 8 bits, and multiplies in them where the device does",
    "tf32": _TF32,
    "load_in_4bit": _QLORA,
    "quantization_bit": _QLORA,
    "quantization_method": _NF4,
    "quantization_type": _NF4,
    "bnb_4bit_quant_type": _NF4,
    "bnb_4bit_compute_dtype": _NF4,
    "bnb_4bit_use_double_quant": _NF4,
    "use_bnb_nested_quant": _NF4,
    "double_quantization": _NF4,
    "load_in_8bit": _8BIT,
    "load_in_16bit": _PRECISION,
    "attn_implementation": _ATTENTION,
    "flash_attention": _ATTENTION,
    "flash_attn": _ATTENTION,
    "use_flash_attention_2": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "flex_attention": _ATTENTION,
    "xformers_attention": _ATTENTION,
    "eager_attention": _ATTENTION,
    "shift_attn": _ATTENTION,
    "use_liger_kernel": _KERNELS,
    "use_liger": _KERNELS,
    "enable_liger_kernel": _KERNELS,
    "liger_kernel_config": _KERNELS,
    "liger_fused_linear_cross_entropy": _KERNELS,
    "liger_cross_entropy": _KERNELS,
    "liger_rope": _KERNELS,
    "liger_rms_norm": _KERNELS,
    "liger_glu_activation": _KERNELS,
    "cut_cross_entropy": _KERNELS,
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
    "use_unsloth": _KERNELS,
    "plugins": _KERNELS,
    "loss": "The loss is the cross-entropy of the trained tokens. Remove it",
    "loss_type": "The loss is the cross-entropy of the trained tokens. Remove it",
    "gradient_checkpointing_kwargs": _ACTIVATIONS,
    "use_gradient_checkpointing": _ACTIVATIONS,
    "disable_gradient_checkpointing": _ACTIVATIONS,
    "enable_activation_checkpointing": _ACTIVATIONS,
    "activation_checkpointing": _ACTIVATIONS,
    "activation_offloading": "Use `gradient_checkpointing=offload`",
    "enable_activation_offloading": "Use `gradient_checkpointing=offload`",
    "optimizer_in_bwd": _OFFLOAD,
    "fsdp_cpu_offload": _OFFLOAD,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "torch_empty_cache_steps": "The device's cache is managed. Remove it",
    "max_memory": "`max_tokens_per_microbatch` bounds what is computed at once",
    "gpu_memory_utilization": "`max_tokens_per_microbatch` bounds what is computed at once",
    "auto_find_batch_size": "`max_tokens_per_microbatch` is found by itself. Remove it",
    "device_map": "Use `device`",
    "use_cpu": "Use `device=cpu`",
    "no_cuda": "Use `device=cpu`",
    # -- what is trained
    "adapter": f"{_FULL}. For qlora: `quantization=nf4`",
    "finetuning_type": _FULL,
    "full_finetuning": _FULL,
    "use_peft": _FULL,
    "use_lora": _FULL,
    "peft_config": _FULL,
    "peft_type": _FULL,
    "lora_r": "Use `lora_rank`",
    "lora_dim": "Use `lora_rank`",
    "r": "Use `lora_rank`",
    "bias": _NO_BIAS,
    "lora_bias": _NO_BIAS,
    "lora_target": _TARGETS,
    "lora_target_modules": _TARGETS,
    "lora_target_linear": _TARGETS,
    "lora_target_parameters": _TARGETS,
    "target_modules": _TARGETS,
    "target_parameters": _TARGETS,
    "lora_attn_modules": _TARGETS,
    "apply_lora_to_mlp": "Use `train_mlp`",
    "apply_lora_to_output": "Use `train_unembed`",
    "additional_target": _SAVED,
    "modules_to_save": _SAVED,
    "lora_modules_to_save": _SAVED,
    "layers_to_transform": _LAYERS,
    "layers_pattern": _LAYERS,
    "lora_layers_to_transform": _LAYERS,
    "peft_layers_to_transform": _LAYERS,
    "peft_layers_pattern": _LAYERS,
    "exclude_modules": _LAYERS,
    "lora_exclude_modules": _LAYERS,
    "rank_pattern": _LORA_ONLY,
    "alpha_pattern": _LORA_ONLY,
    "trainable_token_indices": _SAVED,
    "peft_trainable_token_indices": _SAVED,
    "freeze_trainable_layers": f"Layers are not frozen one by one. {_FULL}",
    "unfrozen_parameters": f"Layers are not frozen one by one. {_FULL}",
    "lora_fan_in_fan_out": _LORA_ONLY,
    "lora_task_type": _LORA_ONLY,
    "task_type": _LORA_ONLY,
    "peft_use_rslora": "Use `use_rslora`",
    "use_dora": _LORA_ONLY,
    "peft_use_dora": _LORA_ONLY,
    "pissa_init": _LORA_ONLY,
    "loftq_config": _LORA_ONLY,
    "init_lora_weights": _LORA_ONLY,
    "loraplus_lr_ratio": _LORA_ONLY,
    "use_galore": _NO_GALORE,
    "use_apollo": _NO_GALORE,
    "use_badam": _NO_GALORE,
    "create_new_adapter": "`load_checkpoint_path` starts from an adapter's weights",
    "adapter_name_or_path": "Use `load_checkpoint_path`",
    "lora_model_dir": "Use `load_checkpoint_path`",
    "lora_path": "Use `load_checkpoint_path`",
    "train_on_inputs": f"`train_on_what=all_tokens` trains everything; {_TRAINED}",
    "train_on_input": f"`train_on_what=all_tokens` trains everything; {_TRAINED}",
    "train_on_prompt": f"`train_on_what=all_tokens` trains everything; {_TRAINED}",
    "train_on_responses_only": "That is `train_on_what=all_assistant_messages`, the default",
    "assistant_only_loss": "That is `train_on_what=all_assistant_messages`, the default",
    "completion_only_loss": "`train_on_what=last_assistant_message` trains only the last reply",
    "mask_history": "`train_on_what=last_assistant_message` trains only the last reply",
    "roles_to_train": _TRAINED,
    "train_on_eos": "The end of a trained turn is always trained. Remove it",
    "train_on_eot": "The end of a trained turn is always trained. Remove it",
    "instruction_part": "`train_on_what` finds the replies by the chat format. Remove it",
    "response_part": "`train_on_what` finds the replies by the chat format. Remove it",
    "response_template": "`train_on_what` finds the replies by the chat format. Remove it",
    # -- the chat format
    "template": _TEMPLATE,
    "chat_template": _TEMPLATE,
    "chat_template_path": _TEMPLATE,
    "chat_template_jinja": _TEMPLATE,
    "prompt_template": _TEMPLATE,
    "conversation_template": _TEMPLATE,
    "tool_format": _TEMPLATE,
    "enable_thinking": "`template_kwargs` sets variables of a template (template_kwargs.enable_thinking); "
    "other renderers say it in their name, as qwen3_disable_thinking",
    "chat_template_kwargs": "`template_kwargs` sets variables of the chat template in every conversation",
    "efficient_eos": _TEMPLATE,
    "default_system": "Use `system_prompt`",
    "default_system_message": "Use `system_prompt`",
    "system_message": "Use `system_prompt`",
    "new_system_prompt": "Use `system_prompt`",
    # -- data
    "datasets": _DATASET,
    "dataset_name": _DATASET,
    "dataset_path": _DATASET,
    "data_path": _DATASET,
    "train_file": _DATASET,
    "train_dataset": _DATASET,
    "train_data": _DATASET,
    "data_files": _DATASET,
    "dataset_dir": f"{_DATASET}; a file is named by its path",
    "dataset_config": "`dataset=owner/name:config` names a configuration",
    "dataset_config_name": "`dataset=owner/name:config` names a configuration",
    "dataset_split": "`dataset=owner/name:config:split` names a split",
    "dataset_train_split": "`dataset=owner/name:config:split` names a split",
    "dataset_test_split": "`eval_dataset=owner/name:config:split` names a split",
    "dataset_text_field": _FORMAT,
    "dataset_kwargs": _FORMAT,
    "dataset_type": _FORMAT,
    "column_map": _FORMAT,
    "field_messages": _FORMAT,
    "message_property_mappings": _FORMAT,
    "formatting_func": _FORMAT,
    "remove_unused_columns": "Columns that are not read are left alone. Remove it",
    "test_datasets": _TEST,
    "test_dataset": _TEST,
    "validation_file": _TEST,
    "val_size": _NUM_TEST,
    "val_set_size": _NUM_TEST,
    "eval_split_ratio": _NUM_TEST,
    "max_samples": "`max_steps` bounds a run; a file may be cut beforehand",
    "max_train_samples": "`max_steps` bounds a run; a file may be cut beforehand",
    "max_eval_samples": _NUM_TEST,
    "dataset_streaming": "Use `streaming`",
    "dataset_num_proc": _PROC,
    "dataset_processes": _PROC,
    "preprocessing_num_workers": _PROC,
    "preprocessing_batch_size": _PROC,
    "dataset_prepared_path": _RENDERED,
    "tokenized_path": _RENDERED,
    "overwrite_cache": _RENDERED,
    "skip_prepare_dataset": _RENDERED,
    "mix_strategy": _WEIGHTS,
    "interleave_probs": _WEIGHTS,
    "shuffle": _SHUFFLED,
    "shuffle_dataset": _SHUFFLED,
    "shuffle_merged_datasets": _SHUFFLED,
    "disable_shuffling": _SHUFFLED,
    "curriculum_sampling": _SHUFFLED,
    "group_by_length": "Sequences are packed, whatever their lengths. Remove it",
    "length_column_name": "Sequences are packed, whatever their lengths. Remove it",
    "max_seq_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "model_max_length": _LENGTH,
    "sequence_len": _LENGTH,
    "cutoff_len": _LENGTH,
    "block_size": _LENGTH,
    "max_sequence_length": _LENGTH,
    "max_tokens_per_batch": "Use `max_tokens_per_microbatch`",
    "excess_length_strategy": "Use `on_long`: truncate, drop or raise",
    "truncation_side": "Use `on_long`: truncate (from the right), drop or raise",
    "packing": _PACKED,
    "packed": _PACKED,
    "neat_packing": _PACKED,
    "sample_packing": _PACKED,
    "eval_sample_packing": _PACKED,
    "eval_packing": _PACKED,
    "packing_strategy": _PACKED,
    "padding_free": _PACKED,
    "pad_to_sequence_len": _PACKED,
    "pad_to_multiple_of": _PACKED,
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_drop_last": _LOADER,
    # -- batches and steps
    "per_device_train_batch_size": _BATCH,
    "per_gpu_train_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "global_batch_size": _BATCH,
    "micro_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "per_device_eval_batch_size": _EVAL_BATCH,
    "per_gpu_eval_batch_size": _EVAL_BATCH,
    "eval_batch_size": _EVAL_BATCH,
    "eval_accumulation_steps": _EVAL_BATCH,
    "num_train_epochs": "Use `num_epochs`",
    "epochs": "Use `num_epochs`",
    "max_steps_per_epoch": "`max_steps` counts the steps of the full run",
    "max_train_steps": "Use `max_steps`",
    # -- the optimizer
    "lr": "Use `learning_rate`",
    "lr_scheduler_type": _SCHEDULE,
    "lr_scheduler": _SCHEDULE,
    "lr_scheduler_kwargs": _SCHEDULE,
    "scheduler": _SCHEDULE,
    "cosine_min_lr_ratio": "`lr_schedule=cosine` and linear end at 0. Remove it",
    "warmup_ratio": _WARMUP,
    "num_warmup_steps": _WARMUP,
    "optim": _ADAMW,
    "optimizer": _ADAMW,
    "optim_args": _ADAMW,
    "adafactor": _ADAMW,
    "adam_epsilon": "Use `adam_eps`",
    "adam_beta_1": "Use `adam_beta1`",
    "adam_beta_2": "Use `adam_beta2`",
    "beta1": "Use `adam_beta1`",
    "beta2": "Use `adam_beta2`",
    "max_grad_norm": "Use `grad_clip_norm`",
    "clip_grad_norm": "Use `grad_clip_norm`",
    "gradient_clipping": "Use `grad_clip_norm`",
    "label_smoothing_factor": "Labels are not smoothed. Remove it",
    "neftune_noise_alpha": _NO_NOISE,
    "noisy_embedding_alpha": _NO_NOISE,
    "average_tokens_across_devices": "Gradients are summed over all tokens of a step. Remove it",
    # -- several devices
    "deepspeed": _SHARD,
    "deepspeed_config": _SHARD,
    "fsdp": _SHARD,
    "fsdp_config": _SHARD,
    "fsdp_transformer_layer_cls_to_wrap": _SHARD,
    "fsdp_version": _SHARD,
    "custom_sharded_layers": _SHARD,
    "tensor_parallel_size": _SHARD,
    "context_parallel_size": _SHARD,
    "parallelism_config": _SHARD,
    "accelerator_config": _SHARD,
    "local_rank": _DDP,
    "ddp_backend": _DDP,
    "ddp_timeout": _DDP,
    "ddp_find_unused_parameters": _DDP,
    "ddp_bucket_cap_mb": _DDP,
    "world_size": _DDP,
    "num_processes": _DDP,
    # -- evaluation
    "do_eval": _EVAL,
    "eval_strategy": _EVAL,
    "evaluation_strategy": _EVAL,
    "eval_steps": "Use `eval_every`, in steps",
    "evals_per_epoch": "Use `eval_every`, in steps",
    "eval_delay": _EVAL,
    "eval_on_start": "A run is always evaluated at step 0. Remove it",
    "run_val_every_n_steps": "Use `eval_every`, in steps",
    "predict_with_generate": _SAMPLES,
    "eval_table_size": _SAMPLES,
    "eval_max_new_tokens": _SAMPLES,
    "generation_max_length": _SAMPLES,
    "generation_num_beams": _SAMPLES,
    "compute_metrics": "`evaluator_builders` hold the evaluators of a run",
    "metric_for_best_model": "Use `best_metric`",
    "greater_is_better": "Use `best_mode`: min, max or auto",
    "load_best_model_at_end": _BEST,
    "early_stopping_threshold": "Use `early_stopping_min_delta`",
    # -- saving, resuming, pushing
    "output_dir": "Use `log_path`",
    "logging_dir": "Use `log_path`",
    "save_dir": "Use `log_path`",
    "out_dir": "Use `log_path`",
    "overwrite_output_dir": "Use `if_log_path_exists=delete`",
    "save_strategy": _SAVE,
    "save_steps": "Use `save_every`, in steps",
    "saves_per_epoch": "Use `save_every`, in steps",
    "save_every_n_steps": "Use `save_every`, in steps",
    "save_every_epoch": "Use `save_every`, in steps",
    "save_total_limit": _KEEP,
    "keep_last_n_checkpoints": _KEEP,
    "save_only_model": "Checkpoints hold the optimizer, which a resume needs; recipes.export leaves it out",
    "save_adapter_weights_only": "Checkpoints of a LoRA hold the adapter alone; recipes.export merges it",
    "save_safetensors": "Weights are always saved as safetensors. Remove it",
    "save_on_each_node": "The first process saves. Remove it",
    "save_compressed": "Weights are always saved as safetensors. Remove it",
    "resume_from_checkpoint": _RESUME,
    "auto_resume_from_checkpoints": _RESUME,
    "ignore_data_skip": _RESUME,
    "restore_callback_states_from_checkpoint": _RESUME,
    "hub_model_id": _PUSH,
    "hub_strategy": _PUSH,
    "hub_private_repo": _PUSH,
    "hub_always_push": _PUSH,
    "push_dataset_to_hub": "Data are not pushed. Remove it",
    "export_dir": _EXPORT,
    "merge_lora": _EXPORT,
    # -- logging
    "report_to": _REPORT_TO,
    "metric_logger": _REPORT_TO,
    "use_wandb": "Use `wandb_project`",
    "use_tensorboard": "Use `tensorboard`",
    "use_swanlab": _REPORT_TO,
    "use_mlflow": _REPORT_TO,
    "use_comet": _REPORT_TO,
    "run_name": "`wandb_name` and `trackio_name`; a run's own name is its folder, `log_path`",
    "wandb_entity": _WANDB,
    "wandb_run_id": _WANDB,
    "wandb_watch": _WANDB,
    "wandb_log_model": _WANDB,
    "wandb_mode": _WANDB,
    "wandb_run_name": "Use `wandb_name`",
    "trackio_space_id": "`trackio_project` keeps metrics on this machine",
    "logging_steps": _LOGGED,
    "logging_strategy": _LOGGED,
    "logging_first_step": _LOGGED,
    "log_every_n_steps": _LOGGED,
    "log_level": _LOGGED,
    "log_peak_memory_stats": _LOGGED,
    "disable_tqdm": _LOGGED,
    "include_num_input_tokens_seen": _LOGGED,
    "include_tokens_per_second": _LOGGED,
    "plot_loss": "Every run has its page, report.html, and curves.png. Remove it",
    "profiler": _TRACE,
    "profile": _TRACE,
    "debug": _PREVIEW,
    # -- seeds, and what cannot be set here
    "data_seed": _SEED,
    "random_state": _SEED,
    "random_seed": _SEED,
    "full_determinism": "Use `deterministic`",
    "cudnn_deterministic_mode": "Use `deterministic`",
    "do_train": _SFT,
    "do_predict": _SFT,
    "stage": _SFT,
    "rl": _SFT,
    "trainer": _SFT,
    "ref_model": _SFT,
    "pref_beta": _SFT,
    "pref_loss": _SFT,
    "strict": "Unknown keys are always refused. Remove it",
    "_component_": "Name a class as module:Class, for `dataset_builder` or an item of `evaluator_builders`",
}


def answer(key: str) -> str | None:
    """Returns the equivalent of another trainer's key, by the whole key, its first part or its last."""
    name = key.lower().replace("-", "_")
    for part in (name, name.split(".")[0], name.rsplit(".", 1)[-1]):
        if part in ANSWERS:
            return ANSWERS[part]
    return None


def keys_in(answer: str) -> list[str]:
    """Returns the keys of this project that an answer names."""
    return re.findall(r"`([a-z_0-9]+)(?:=[^`]*)?`", answer)
