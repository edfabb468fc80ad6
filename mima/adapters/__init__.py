"""Trained adapters: read from files, merged into one model, or mixed within a batch."""
