"""Memories of the Memory Mosaics, v1 and v2."""
