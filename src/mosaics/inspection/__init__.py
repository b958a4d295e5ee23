"""What the memories of a mosaic retrieved for a text, and what it was worth."""

from mosaics.inspection.inspection import Forecasts, HeadNumbers, Inspection, MemoryReads, Shown, inspect

__all__ = ["Forecasts", "HeadNumbers", "Inspection", "MemoryReads", "Shown", "inspect"]
