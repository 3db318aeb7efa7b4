"""The lean forward pass: no padding, and no logits of tokens without loss.

See docs/explained/lean.md. `adopt.adopt` is the only entry.
"""
