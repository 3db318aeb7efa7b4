"""The LoRA+ paper's theory on a toy: a linear student learns a change of low rank, at any width, in a second."""
