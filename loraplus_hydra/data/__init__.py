"""Sources of rows: callables that return a `datasets.DatasetDict` with the splits "train" and "eval"."""
