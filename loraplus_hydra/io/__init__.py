"""Files, locks and screen of a process."""
