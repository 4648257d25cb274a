"""Makes ``engine_toys`` importable and keeps the engine's tests on the CPU."""

import os
import sys
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"
sys.path.insert(0, str(Path(__file__).parent))
