"""The embedded default: reading the standard library's source, and the small model pretrained on it."""
