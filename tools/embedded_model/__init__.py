"""The script that made the embedded model's weights."""
