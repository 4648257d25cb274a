"""Building, saving and describing models."""
