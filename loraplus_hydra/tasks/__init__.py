"""One file a task: how its rows become the examples that its Trainer takes."""
