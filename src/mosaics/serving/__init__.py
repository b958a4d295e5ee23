"""Models that answer: one conversation in a terminal, or many clients over HTTP."""
