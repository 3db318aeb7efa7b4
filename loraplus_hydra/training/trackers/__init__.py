"""Where a run's numbers are shown besides metrics.jsonl: one tracker a module, chosen by `logger._target_`."""
