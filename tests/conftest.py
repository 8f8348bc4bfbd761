"""Options of the whole suite."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small tensors: threads only cost
