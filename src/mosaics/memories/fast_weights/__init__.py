"""Memories that are weights, written by every token."""
