"""The cost ledger and the latency meter."""
