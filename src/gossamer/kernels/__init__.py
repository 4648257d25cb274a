"""Native and Triton code behind ops, each with a plain-torch reference."""
