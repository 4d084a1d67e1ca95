"""The options of PEFT 0.21's LoRA by their names: which change what an adapter computes."""

CHANGES = {  # those that, where they are set, make it something else
    "use_dora": "DoRA also scales the columns of the whole weight",
    "lora_bias": "B has a bias",
    "alora_invocation_tokens": "aLoRA adapts some tokens only",
    "arrow_config": "Arrow routes tokens between adapters",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its adapters",
    "use_bdlora": "BD-LoRA has factors of blocks",
    "use_qalora": "QALoRA pools the input",
    "velora_config": "VeLoRA keeps a projection beside A and B",
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "it adapts parameters that are not the weight of a linear layer",
    "trainable_token_indices": "it trains single rows of an embedding",
}
HARMLESS = {  # those that do not, or that are read here
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "bias", "fan_in_fan_out"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "megatron_config", "megatron_core", "ensure_weight_tying"),
    "merge_weights",  # of early versions
}
