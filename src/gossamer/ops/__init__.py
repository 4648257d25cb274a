"""Pure functions, autograd functions and layers; torch only."""
