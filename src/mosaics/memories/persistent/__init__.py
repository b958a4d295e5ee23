"""Persistent memories: filled by training."""
