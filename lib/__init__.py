"""Machinery, each file a room of its own. Of our files it imports model, safedpo and lib only.

What stands here happens before torch is imported: the linter puts imports of lib first.
"""

import os

# PyTorch's threads wait for each other many times in each step of a small model. By default they
# wait in a loop that takes the core from whoever they wait for, where other programs are busy too.
# Here they look this many times and then sleep. (GNU's OpenMP, which PyTorch uses on Linux.)
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "300")
