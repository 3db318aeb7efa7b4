"""The toy of the LoRA+ paper's theory: a linear student that learns a change of low rank, at any width, in a second."""
