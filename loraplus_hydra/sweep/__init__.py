"""Sweeps: many jobs with names, folders and statuses, isolated from each other."""
