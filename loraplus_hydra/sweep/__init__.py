"""Sweeps: where each job writes, what is done already, and one process for many jobs that share nothing."""
