"""Tasks, which turn rows into the examples of a Trainer, and the parts that several tasks share."""
