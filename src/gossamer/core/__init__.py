"""The protocol: steps, phases, methods, stacks, errors and the registry of methods."""
