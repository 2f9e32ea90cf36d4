"""Masks as point clouds: a flow VAE whose decoder is a diffusion model.

After Luo & Hu, "Diffusion Probabilistic Models for 3D Point Cloud Generation"
(CVPR 2021), and as FairDiff uses it. A cloud x of N points has a latent z:

  posterior  q(z | x) = N(mean(x), exp(logvar(x)))     PointNet
  prior      w = F(z),  w ~ N(0, I)                    affine coupling layers
             log p(z) = log N(F(z); 0, I) + log |det dF/dz|
  decoder    p(x | z): each point diffuses on its own, and
             eps(x_t, beta_t, z) is a pointwise residual network

A patient's group g enters through the prior alone, p(z | g): the networks of F
see an embedding of g, and z carries it to the decoder. Without groups these are
exactly the original's 3,879,832 parameters.

The loss of a cloud is MSE(eps) - kl_weight (posterior entropy + log prior); its
diffusion process lives in `fairdiff_jax.diffusion`.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairdiff_jax.models import pointwise
from fairdiff_jax.models.batch_norm import BatchNorm

# Uniform of variance 1 / fan in: three times the original's, learns sooner.
Dense = functools.partial(
  pointwise.Dense,
  kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "uniform"),
)


class CancelledBiasDense(nn.Module):
  """Dense layer whose bias the batch normalisation after it cancels.

  The bias's gradient is 0 but for rounding, which Adam would blow up to full
  steps that differ from one mesh to another; so it takes none.
  """

  features: int

  @nn.compact
  def __call__(self, x):
    kernel_shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", Dense.keywords["kernel_init"], kernel_shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return pointwise.matmul(x, kernel) + jax.lax.stop_gradient(bias)


def posterior_entropy(logvar: jax.Array) -> jax.Array:
  """Entropy, in nats, of diagonal Gaussians: logvar [B, D] -> [B]."""
  return 0.5 * jnp.sum(logvar + math.log(2 * math.pi) + 1, axis=-1)


def log_prior(w: jax.Array, logdet: jax.Array) -> jax.Array:
  """Log density, in nats, of the latents that the flow takes to w.

  The original adds the constant -log(2 pi) / 2 once per pair of dimensions, not
  per dimension: its loss is larger by kl_weight D (D - 1) / 2 log(2 pi), which
  has no gradient.

  Args:
    w: [B, D], the flow's output.
    logdet: [B], log |det dw/dz|.

  Returns:
    [B].
  """
  log_normal = -0.5 * jnp.sum(w**2 + math.log(2 * math.pi), axis=-1)
  return log_normal + logdet


class Head(nn.Module):
  """Perceptron with batch normalisation and ReLU between its layers."""

  widths: Sequence[int]
  out_dim: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, weight, train):
    for i, width in enumerate(self.widths):
      x = CancelledBiasDense(width, name=f"dense_{i}")(x)
      x = BatchNorm(self.axis_name, name=f"norm_{i}")(x, weight, train)
      x = nn.relu(x)
    return Dense(self.out_dim, name=f"dense_{len(self.widths)}")(x)


class Posterior(nn.Module):
  """PointNet: points [B, N, 3] -> mean and log variance of z, [B, D] each."""

  widths: Sequence[int]
  head_widths: Sequence[int]
  latent_dim: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, points, weight, train):
    x = points
    last = len(self.widths) - 1
    for i, width in enumerate(self.widths):
      x = nn.relu(x) if i else x
      x = CancelledBiasDense(width, name=f"dense_{i}")(x)
      # The heads' first normalisation cancels the last one's bias.
      norm = BatchNorm(
        self.axis_name,
        learn_bias=i < last,
        highest=i == last,
        name=f"norm_{i}",
      )
      x = norm(x, weight, train)
    head = functools.partial(
      Head, self.head_widths, self.latent_dim, self.axis_name
    )
    mean = head(name="mean")(x, weight, train)
    logvar = head(name="logvar")(x, weight, train)
    return mean, logvar


class Coupling(nn.Module):
  """Affine coupling: one half of z sets the scale and shift of the other.

  Attributes:
    width: of the two hidden layers.
    swap: move the first half and keep the second, not the other way round.
  """

  width: int
  swap: bool

  @nn.compact
  def __call__(self, z, context, inverse=False):
    """Maps z [B, D] to ([B, D], log scale [B]), given context [B, C] or None.

    The log scale is log |det| of the forward map, also when `inverse`.
    """
    first, second = jnp.split(z, 2, axis=-1)
    kept, moved = (second, first) if self.swap else (first, second)
    h = kept if context is None else jnp.concatenate([kept, context], axis=-1)
    h = nn.relu(Dense(self.width, name="dense_0")(h))
    h = nn.relu(Dense(self.width, name="dense_1")(h))
    h = Dense(z.shape[-1], name="dense_2")(h)
    raw_scale, shift = jnp.split(h, 2, axis=-1)
    log_scale = nn.log_sigmoid(raw_scale + 2)
    if inverse:
      moved = (moved - shift) * jnp.exp(-log_scale)
    else:
      moved = moved * jnp.exp(log_scale) + shift
    halves = (moved, kept) if self.swap else (kept, moved)
    return jnp.concatenate(halves, axis=-1), jnp.sum(log_scale, axis=-1)


class Layer(nn.Module):
  """The kernel [inputs, features] and the bias [features] of a `Dense`."""

  inputs: int
  features: int

  @nn.compact
  def __call__(self):
    shape = (self.inputs, self.features)
    return (
      self.param("kernel", Dense.keywords["kernel_init"], shape),
      self.param("bias", nn.initializers.zeros, (self.features,)),
    )


class GatedDense(nn.Module):
  """layer(x) * sigmoid(gate(c)) + bias(c), x [B, N, .] and c [B, 1, .].

  The gate multiplies the layer's bias before there are points: x K gate +
  (b gate + bias) passes once less over them all, and thrice in its gradient.
  """

  features: int

  @nn.compact
  def __call__(self, x, context):
    gate = nn.sigmoid(Dense(self.features, name="gate")(context))
    bias = Dense(self.features, use_bias=False, name="bias")(context)
    kernel, layer_bias = Layer(x.shape[-1], self.features, name="layer")()
    bias += layer_bias * gate
    return pointwise.matmul(x, kernel) * gate + bias


class Denoiser(nn.Module):
  """Noise of each point [B, N, 3], given beta [B] and the latent [B, D]."""

  widths: Sequence[int]

  @nn.compact
  def __call__(self, points, beta, latent):
    time = jnp.stack([beta, jnp.sin(beta), jnp.cos(beta)], axis=-1)
    context = jnp.concatenate([time, latent], axis=-1)[:, None]
    x = points
    for i, width in enumerate(self.widths):
      x = GatedDense(width, name=f"gated_{i}")(x, context)
      x = nn.leaky_relu(x, 0.01)
    last = GatedDense(points.shape[-1], name=f"gated_{len(self.widths)}")
    return points + last(x, context)


class PointFlowVAE(nn.Module):
  """The posterior, the prior's flow and the denoiser, as one set of variables.

  Call the methods through `module.apply(variables, ..., method='encode')`.

  Attributes:
    latent_dim: D, even.
    encoder_widths: pointwise layers of the posterior.
    head_widths: hidden layers of its mean and of its log variance.
    flow_depth: coupling layers; those with an even index move the first half.
    flow_width: their hidden layers' width.
    decoder_widths: hidden layers of the denoiser.
    num_groups: G; 0 for the original's unconditional prior.
    group_dim: size of a group's embedding.
    axis_name: mapped axis that holds the shards of the batch, or None.
  """

  latent_dim: int = 256
  encoder_widths: Sequence[int] = (128, 128, 256, 512)
  head_widths: Sequence[int] = (256, 128)
  flow_depth: int = 14
  flow_width: int = 256
  decoder_widths: Sequence[int] = (128, 256, 512, 256, 128)
  num_groups: int = 0
  group_dim: int = 16
  axis_name: str | None = None

  def setup(self):
    if self.latent_dim % 2:
      raise ValueError(f"latent_dim must be even, got {self.latent_dim}")
    self.posterior = Posterior(
      self.encoder_widths, self.head_widths, self.latent_dim, self.axis_name
    )
    self.coupling = [
      Coupling(self.flow_width, swap=i % 2 == 0) for i in range(self.flow_depth)
    ]
    if self.num_groups:
      self.group = nn.Embed(self.num_groups + 1, self.group_dim)
    self.denoiser = Denoiser(self.decoder_widths)

  def __call__(self, points: jax.Array) -> jax.Array:
    """Runs every network once, for `init`: points [B, N, 3] -> [B, N, 3]."""
    mean, _ = self.encode(points)
    self.flow(mean)
    return self.denoise(points, jnp.zeros(points.shape[0]), mean)

  def encode(
    self,
    points: jax.Array,
    weight: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, jax.Array]:
    """Posterior of a cloud's latent.

    Args:
      points: [B, N, 3], in units of the data set's scale.
      weight: [B], 0 for padding, or None; matters to batch statistics alone.
      train: normalise by the batch and update 'batch_stats'.

    Returns:
      Mean and log variance, each [B, D].
    """
    return self.posterior(points, weight, train)

  def flow(
    self, latent: jax.Array, group: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Takes latents to the standard normal.

    Args:
      latent: [B, D].
      group: [B], from -1 (unknown) to G - 1; None means unknown. Without effect
        where `num_groups` is 0.

    Returns:
      w [B, D] and log |det dw/dz| [B].
    """
    context = self._context(latent, group)
    logdet = jnp.zeros(latent.shape[0])
    for coupling in self.coupling:
      latent, log_scale = coupling(latent, context)
      logdet += log_scale
    return latent, logdet

  def inverse_flow(
    self, w: jax.Array, group: jax.Array | None = None
  ) -> jax.Array:
    """Takes standard normal w [B, D] to latents [B, D]; `group` as in flow."""
    context = self._context(w, group)
    for coupling in reversed(self.coupling):
      w, _ = coupling(w, context, inverse=True)
    return w

  def denoise(
    self, points: jax.Array, beta: jax.Array, latent: jax.Array
  ) -> jax.Array:
    """Predicts the noise in points [B, N, 3], given beta_t [B], latent [B, D].

    Returns:
      [B, N, 3].
    """
    return self.denoiser(points, beta, latent)

  def _context(self, latent, group):
    if not self.num_groups:
      return None
    if group is None:
      group = jnp.full(latent.shape[0], -1)
    # The last of the G + 1 rows is that of the unknown group.
    return self.group(jnp.where(group < 0, self.num_groups, group))
