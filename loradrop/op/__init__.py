"""The op `lora_linear`: its call, its backends, its one autograd Function."""
