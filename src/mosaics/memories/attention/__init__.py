"""Attention: the Transformer's memory and its relatives."""
