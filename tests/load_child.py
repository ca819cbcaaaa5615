"""One of several processes: load a store cut over the devices of all of them, and compute logits.

python load_child.py STORE OUT.npy [HOST:PORT PROCESS_ID PROCESSES]
"""

import sys

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType

from gptq_jax.models.prepared import prepare
from gptq_jax.parallel import hosts
from gptq_jax.storage import load

store, out, *joined = sys.argv[1:]
if joined:
    coordinator, process_id, processes = joined
    hosts.join(coordinator, int(process_id), int(processes))
mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(AxisType.Auto,))
model = load(store, mesh=mesh)
codes = model.params["layers"][0]["mlp"]["gate_proj"]["kernel"].codes
assert codes.is_fully_addressable == (not joined)
assert len({str(shard.index) for shard in codes.addressable_shards}) == jax.local_device_count()
logits = process_allgather(prepare(model)(np.arange(24, dtype=np.int32)[None]), tiled=True)
if hosts.is_first():
    np.save(out, logits)
