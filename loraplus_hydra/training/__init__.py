"""Preparation and training of a run."""
