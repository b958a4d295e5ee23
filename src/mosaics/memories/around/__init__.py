"""Memories around the whole stack of blocks: they say what the blocks read together."""
