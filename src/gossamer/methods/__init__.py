"""The rooms, one a method; read through core.registry."""

from gossamer.core.callable_module import forward_calls

forward_calls(__name__)
