"""Base model, tokenizer, quantisation and adapter."""
