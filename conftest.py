"""The suite runs in two workers (``pyproject.toml``): one thread each, or they would only get in each other's way."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # read when torch is imported, which nothing has done yet
