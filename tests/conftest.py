"""Options of the whole suite."""

import os

# Many small tensors: threads only cost. And hashes of frames are those of one thread everywhere,
# in worker processes too, which always have one.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
