"""The cost ledger and the latency meter."""

from gossamer.core.callable_module import forward_calls

forward_calls(__name__)
