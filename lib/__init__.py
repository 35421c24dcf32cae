"""Machinery, each file a room of its own. Of our files it imports model, safedpo and lib only.

What stands here happens before torch is imported: the linter puts imports of lib first.
"""

import os
import sys

# PyTorch's threads wait for each other many times in each step of a small model. By default they
# wait in a loop that takes the core from whoever they wait for, where other programs are busy too.
# Here they look this many times and then sleep. (GNU's OpenMP, which PyTorch uses on Linux.)
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "300")

# On a CPU, bfloat16 products compile code for each new shape, half a megabyte each time, and keep
# the last 1,024 in two places. Rows have ever new lengths, so that few are used again.
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
for cache in CACHES:
    os.environ.setdefault(cache, "64")

# On a GPU rows of ever new lengths would leave holes in memory that nothing fits into.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its earlier name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
