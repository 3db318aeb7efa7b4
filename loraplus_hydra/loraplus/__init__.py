"""The LoRA+ method: role, rule, group, optimizer and schedule. Needs only torch and PEFT."""
