"""Prepare a job and train it."""
