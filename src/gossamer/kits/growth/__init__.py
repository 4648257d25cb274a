"""Growing networks: depth operators, the elastic supernet, a step timer."""
