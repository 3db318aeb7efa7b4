"""How the embedded model's weights were made."""
