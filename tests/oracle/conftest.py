"""One thread for torch: threads of torch and of XLA that spin for each other's cores multiply the time of these tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
