"""Checkpoints in the forms of other engines."""
