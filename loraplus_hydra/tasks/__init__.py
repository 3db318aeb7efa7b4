"""Tasks, one file each: they turn rows into the examples that their Trainer takes."""
