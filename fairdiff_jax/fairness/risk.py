r"""Group-wise risk over the whole global batch.

    R_g = sum_i w_i [a_i = g] l_i / sum_i w_i [a_i = g]

Sums and counts are taken first over all shards, then divided once: a mean of
per-device means would weigh cases by how they happen to be sharded.
"""

import flax.struct
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


def group_sum(
  values: jax.Array,
  group: jax.Array,
  weight: jax.Array,
  num_groups: int,
  axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sums [G, ...] of values [B, ...] by group, and counts [G].

  Arguments as for `group_risk`.
  """
  member = jax.nn.one_hot(group, num_groups, dtype=values.dtype)
  member *= weight[:, None]
  trailing = (1,) * (values.ndim - 1)
  total = global_sum(
    member.reshape(*member.shape, *trailing) * values[:, None], axis_name
  )
  return total, global_sum(member, axis_name)


def group_risk(
  losses: jax.Array,
  group: jax.Array,
  weight: jax.Array,
  num_groups: int,
  axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Mean loss of every group in the global batch.

  >>> losses, group = jnp.array([1.0, 3.0, 5.0]), jnp.array([0, 0, -1])
  >>> risk, count = group_risk(losses, group, jnp.ones(3), num_groups=2)
  >>> risk.tolist(), count.tolist()
  ([2.0, 0.0], [2.0, 0.0])

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
  total, count = group_sum(losses, group, weight, num_groups, axis_name)
  return total / jnp.where(count > 0, count, 1), count


class RunningRisk(flax.struct.PyTreeNode):
  """Exponential moving average of every group's risk, debiased.

  >>> average = RunningRisk.start(2)
  >>> seen = jnp.array([2.0, 0.0]), jnp.array([5, 0])
  >>> average.update(*seen, decay=0.9).risk.tolist()
  [2.0, 0.0]

  A group's average moves only with batches in which the group is present; the
  weight given so far divides it, so that the first value counts in full.

  Attributes:
    total: [G].
    weight: [G], 0 for groups never seen.
  """

  total: jax.Array
  weight: jax.Array

  @classmethod
  def start(cls, num_groups: int) -> "RunningRisk":
    return cls(jnp.zeros(num_groups), jnp.zeros(num_groups))

  def update(
    self, risk: jax.Array, count: jax.Array, decay: float
  ) -> "RunningRisk":
    """The average after a batch's risk [G] and count [G]."""

    def move(average, value):
      moved = decay * average + (1 - decay) * value
      return jnp.where(count > 0, jax.lax.stop_gradient(moved), average)

    return RunningRisk(move(self.total, risk), move(self.weight, 1.0))

  @property
  def risk(self) -> jax.Array:
    """[G], 0 for groups never seen."""
    return self.total / jnp.where(self.weight > 0, self.weight, 1)

  @property
  def seen(self) -> jax.Array:
    """bool [G]."""
    return self.weight > 0

  def fill(
    self, risk: jax.Array, count: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """A batch's risk [G] with the average in place of absent groups.

    Returns:
      (risk [G], known bool [G]); no gradient flows through the average.
    """
    present = count > 0
    average = jax.lax.stop_gradient(self.risk)
    return jnp.where(present, risk, average), present | self.seen
