"""Tables and figures from what runs left on disk."""
