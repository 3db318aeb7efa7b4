"""A toy for the LoRA+ paper's theory: a linear student learns a low-rank change."""
