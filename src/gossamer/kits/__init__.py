"""What several methods share and ops cannot hold."""
