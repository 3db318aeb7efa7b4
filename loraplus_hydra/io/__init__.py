"""Files, locks, signals, screen and log of a process."""
