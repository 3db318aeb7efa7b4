"""Benchmarks: a YAML config each, JSON results, a table. Figures that the documentation states come from here."""
