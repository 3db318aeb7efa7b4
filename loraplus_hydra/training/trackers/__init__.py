"""Trackers, which show a run's numbers elsewhere: one a module, chosen by `logger._target_`."""
