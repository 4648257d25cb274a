"""From a batch to outputs, loss and metrics."""
