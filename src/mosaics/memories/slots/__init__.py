"""Memories of a fixed number of slots."""
