"""Trackers, which pass a run's numbers to other tools. `logger._target_` chooses one."""
