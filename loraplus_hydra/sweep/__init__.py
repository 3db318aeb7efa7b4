"""Sweeps: the names, folders, statuses and isolation of many jobs."""
