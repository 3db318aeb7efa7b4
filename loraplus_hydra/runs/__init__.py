"""One run: trained, resumed, reopened and shown."""
