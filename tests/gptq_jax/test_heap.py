import subprocess
import sys

import pytest

# Arrays of 20 MB come and go below one that stays, which keeps a heap from shrinking.
CHURN = """
import sys
import numpy as np
if sys.argv[1] == "given back":
    import importlib.util
    spec = importlib.util.spec_from_file_location("heap", sys.argv[2])
    heap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(heap)
    heap.give_back_large_arrays()
np.ones(31 << 20, np.uint8)
many = [np.ones(20 << 20, np.uint8) for _ in range(10)]
last = np.ones(2 << 20, np.uint8)
many.clear()
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc, and Linux's account of memory")
def test_freed_arrays_go_back_to_the_system():
    from gptq_jax import heap

    def resident(how):
        command = [sys.executable, "-c", CHURN, how, heap.__file__]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)

    assert resident("kept") > 200  # what it is for
    assert resident("given back") < 100
