"""Image sources, transforms, loaders and the embedded set."""
