"""One thread and, unless asked, the CPU.

The suite runs in two workers (``pyproject.toml``), which with more threads would only get in each other's way.
Trainings run on the CPU, so that every machine checks the same; ``ACCELERATE_USE_CPU=false pytest`` runs them on a GPU.
"""

import os

# read when torch and Accelerate are imported, which nothing has done yet
for name, value in (("OMP_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1"), ("ACCELERATE_USE_CPU", "true")):
    os.environ.setdefault(name, value)
