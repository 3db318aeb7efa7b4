"""Benchmarks with a YAML config, JSON results and a table each; the documentation quotes them."""
