"""The rooms, one a method; read through core.registry."""
