r"""Group-wise risk over the whole global batch.

    R_g = sum_i w_i [a_i = g] l_i / sum_i w_i [a_i = g]

Sums and counts are taken first over all shards, then divided once: a mean of
per-device means would weigh cases by how they happen to be sharded.
"""

import jax
import jax.numpy as jnp


def global_sum(x: jax.Array, axis_name: str | None = None) -> jax.Array:
  """Sum over axis 0, and over `axis_name`'s devices if one is given."""
  total = jnp.sum(x, axis=0)
  return total if axis_name is None else jax.lax.psum(total, axis_name)


def weighted_mean(
  losses: jax.Array, weight: jax.Array, axis_name: str | None = None
) -> jax.Array:
  """Mean of losses [B] under weights [B], 0 if all weights are 0."""
  total = global_sum(losses * weight, axis_name)
  count = global_sum(weight, axis_name)
  return total / jnp.where(count > 0, count, 1)


def group_risk(
  losses: jax.Array,
  group: jax.Array,
  weight: jax.Array,
  num_groups: int,
  axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Mean loss of every group in the global batch.

  Args:
    losses: per-example losses [B].
    group: group index int32 [B]; cases outside 0..G-1 (-1 = unknown) belong
      to no group.
    weight: example weights [B], 0 = padding.
    num_groups: G.
    axis_name: None for the global view (`jit` over a mesh), or the mapped
      axis of the per-shard view (`pmap`, `shard_map`).

  Returns:
    (risk [G], count [G]): a group without a case has risk 0 and count 0.
  """
  member = jax.nn.one_hot(group, num_groups, dtype=losses.dtype)
  member *= weight[:, None]
  total = global_sum(member * losses[:, None], axis_name)
  count = global_sum(member, axis_name)
  return total / jnp.where(count > 0, count, 1), count
