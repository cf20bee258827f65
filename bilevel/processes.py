"""Several processes that run one script: what they agree on, and arrays of which each holds a part."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding


class Team(NamedTuple):
    """The processes that one run is spread over. All of them have to call each method, in the same order."""

    several: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return not self.several or jax.process_index() == 0

    def chosen(self, value: float) -> float:
        """A number as the first process has it: clocks differ."""
        if not self.several:
            return value
        return float(multihost_utils.broadcast_one_to_all(np.float32(value)))

    def anywhere(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return flag if not self.several else bool(np.any(self._all(flag)))

    def same(self, value: int) -> bool:
        """Whether it is the same number in all of them."""
        return not self.several or len(np.unique(self._all(value))) == 1

    def _all(self, value: int) -> np.ndarray:
        return np.asarray(multihost_utils.process_allgather(np.int32(value)))


def team(mesh: Mesh | None) -> Team:
    """Those of the mesh. Raises ValueError where it has devices of some processes only."""
    if mesh is None or not mesh.is_multi_process:
        return Team()
    there = {device.process_index for device in mesh.devices.flat}
    if len(there) != jax.process_count():
        raise ValueError(
            f"the mesh has devices of {len(there)} of {jax.process_count()} processes; expected those of "
            "all, or of one alone."
        )
    return Team(several=True)


def gather(tree: Any) -> Any:
    """The arrays of a tree in NumPy, whole in every process, wherever their parts lie.

    What `bilevel launch` needs to look at `result.w`: each process of a mesh holds the rows of its own tasks.
    All processes have to call it. Random keys are given as their data.
    """
    return jax.tree.map(whole, tree)


def whole(leaf: Any) -> np.ndarray:
    """One array, as `gather` does."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def put(leaf: jax.Array, where: Sharding) -> jax.Array:
    """`jax.device_put`, also onto devices of other processes: each of them has the whole array already."""
    if where.is_fully_addressable:
        return jax.device_put(leaf, where)
    if not leaf.is_fully_addressable:
        if leaf.sharding.is_equivalent_to(where, leaf.ndim):
            return leaf
        return jax.jit(lambda x: x, out_shardings=where)(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(leaf), where)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, where, lambda part: host[part])
