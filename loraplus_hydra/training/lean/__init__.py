"""The lean forward: a batch's log-probabilities and hidden states without padding and without unused logits.

See docs/lean.md. `adopt.adopt` is the only entry.
"""
