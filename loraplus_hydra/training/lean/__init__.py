"""The lean forward: no padding, and no logits that nothing needs.

See docs/lean.md. `adopt.adopt` is the only entry.
"""
