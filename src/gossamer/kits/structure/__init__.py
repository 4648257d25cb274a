"""Structured pruning: what can be removed, how it is scored, chosen, masked and cut out."""
