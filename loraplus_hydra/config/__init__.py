"""The schema, and how a config names things."""
