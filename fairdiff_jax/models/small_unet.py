"""A small U-Net for segmentation (Ronneberger et al. 2015).

Works on 2 x 2 patches folded into channels, with group normalisation, so
that it trains in seconds on a CPU.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax.models.pointwise import PointwiseConv
from fairdiff_jax.models.unet import depth_to_space, space_to_depth, upsample


class SmallUNet(nn.Module):
  """Images [B, H, W, 1] -> logits [B, H, W, num_classes].

  H and W must be multiples of patch * 2 ** (len(channels) - 1). The deepest
  level's mean [B, channels[-1]] is sown as intermediate 'features'.
  """

  channels: Sequence[int] = (16, 32, 48)
  num_classes: int = 3
  patch: int = 2

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
    del train  # the same in training and evaluation
    x = space_to_depth(image, self.patch)
    skips = []
    for i, channels in enumerate(self.channels):
      if i:
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
      x = self._block(x, channels, f"down_{i}")
      skips.append(x)
    self.sow("intermediates", "features", jnp.mean(x, axis=(1, 2)))
    for i in reversed(range(len(self.channels) - 1)):
      x = upsample(x)
      x = jnp.concatenate([x, skips[i]], axis=-1)
      x = self._block(x, self.channels[i], f"up_{i}")
    x = PointwiseConv(self.num_classes * self.patch**2, name="conv_out")(x)
    return depth_to_space(x, self.patch)

  def _block(self, x, channels, name):
    for i in range(2):
      x = nn.Conv(channels, (3, 3), use_bias=False, name=f"{name}_conv_{i}")(x)
      groups = int(np.gcd(8, channels))
      norm = nn.GroupNorm(
        groups, use_fast_variance=False, name=f"{name}_norm_{i}"
      )
      x = nn.relu(norm(x))
    return x
