"""Many devices, by JAX's meshes: batches shared among them, sums in a fixed order, layers solved by outputs."""

from gptq_jax.parallel.data import AXIS, PARALLEL, DataParallel, choose_devices, is_cut, make_mesh

__all__ = ["AXIS", "PARALLEL", "DataParallel", "choose_devices", "is_cut", "make_mesh"]
