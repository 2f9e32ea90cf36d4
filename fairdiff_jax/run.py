"""A run: what was asked for, and all that can be done with what it learned."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from fairdiff_jax import config as configs
from fairdiff_jax import experiment, handover
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data.groups import group_code, vocabulary_of
from fairdiff_jax.evaluation import evaluate, predict
from fairdiff_jax.evaluation.predictor import Predictor
from fairdiff_jax.layout import Layout
from fairdiff_jax.synthesis import export
from fairdiff_jax.synthesis.generate import (
  make_generator,
  make_image_generator,
)
from fairdiff_jax.training.journal import sending
from fairdiff_jax.training.trained import Trained, parse_checkpoint, restore


class Run:
  """A run, by its directory.

  >>> import fairdiff_jax
  >>> run = fairdiff_jax.Run("runs/first")
  >>> run.config.data.attribute, run.groups
  ('race', ('Asian', 'Black', 'White'))

  What it has learned is read when it is first asked for, from a checkpoint;
  images are uint8 [H, W], or RGB [H, W, 3] where the run's domain
  has three channels, and masks hold classes: 0 background, i + 1 what structure
  i of `domain` has painted last (`domain.label` makes label images of them).

  Args:
    workdir: the run's directory.
    config: what to do, such as of `fairdiff_jax.recipe`; None for that of the
      run which is there.
    checkpoint: 'best', by the run's validations; 'last'; a step; None for the
      best where there is one, else the last.

  Attributes:
    layout: what lies where in the directory.
    config: what the run does.

  Raises:
    FileNotFoundError: there is no run, and no config.
    ValueError: the config cannot run, or there can be no such checkpoint.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    config: ConfigDict | None = None,
    *,
    checkpoint: str | int | None = None,
  ):
    self.layout = Layout(workdir)
    if config is None:
      config = configs.load(self.layout.workdir)
    configs.check(config)
    self.config = config
    self._checkpoint = parse_checkpoint(checkpoint)
    self._predictors: dict[int, Predictor] = {}  # by batch size

  def __repr__(self) -> str:
    return f"Run({str(self.layout.workdir)!r})"

  @functools.cached_property
  def trained(self) -> Trained:
    """The run at its checkpoint.

    >>> import fairdiff_jax
    >>> fairdiff_jax.Run("runs/first", checkpoint="last").trained.step
    8

    Raises:
      FileNotFoundError: it has none.
      ValueError: it is of another config, or cannot be read, or there is no
        such checkpoint.
    """
    configs.load_record(self.layout.workdir)
    configs.require(self.layout.workdir, self.config)
    return restore(self.layout.workdir, self._checkpoint)

  @property
  def domain(self) -> domains.Domain:
    """What images and masks show.

    >>> import fairdiff_jax
    >>> fairdiff_jax.Run("runs/first").domain.names
    ('disc', 'cup')
    """
    return self.trained.domain

  @property
  def groups(self) -> tuple[str, ...]:
    """Names of the groups.

    >>> import fairdiff_jax
    >>> fairdiff_jax.Run("runs/first").groups
    ('Asian', 'Black', 'White')
    """
    return self.trained.setup.objective.group_names

  def train(self, *, proceed: bool = False, wandb: str = "") -> bool:
    """Trains, with a baseline if the config asks for one, and reports.

    What was interrupted goes on from the newest checkpoint.

    >>> import fairdiff_jax
    >>> validated = {"data.validation": 0.2, "evaluation.every": 2}
    >>> config = fairdiff_jax.recipe("phantom:smoke", validated)
    >>> fairdiff_jax.Run("runs/first", config).train()
    True

    Args:
      proceed: whether an existing run may go on with another config than it
        had, which is recorded.
      wandb: project of Weights & Biases that its numbers are sent to as well,
        but no picture; '' for none.

    Returns:
      Whether it is complete; False if it was asked to stop, by a signal.

    Raises:
      ValueError: the config cannot run; the directory belongs to a run of
        another config or data; or another process writes to it.
      ImportError: wandb is asked for and not installed.
    """
    self._forget()
    with sending(wandb):
      return experiment.run(self.config, self.layout.workdir, proceed=proceed)

  def evaluate(
    self,
    data: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
  ) -> dict:
    """Evaluates the run and writes its report, by `config.evaluation`.

    >>> import fairdiff_jax
    >>> figures = fairdiff_jax.Run("runs/first").evaluate(out="again")
    >>> figures["n"], list(figures["groups"])
    (6, ['Asian', 'Black', 'White'])

    Args:
      data: another prepared directory, of which the test cases are taken, by
        the groups found there; None for the run's own.
      out: where the report goes; None for the run's own place for it.

    Returns:
      What the report's summary.json holds.

    Raises:
      FileNotFoundError: the run has no checkpoint, or there is no such data.
      ValueError: the data is not what the run was trained on, or, if it is
        other data, not what it could have been trained on.
    """
    place = None if out is None else Path(out)
    if data is None:
      return evaluate.evaluate(self.trained, place, self.config.evaluation)
    return evaluate.evaluate_elsewhere(
      self.trained, Path(data), place, self.config.evaluation
    )

  def report(self, data: str | os.PathLike | None = None) -> Path:
    """Where `evaluate` writes to, if it is not told otherwise.

    >>> import fairdiff_jax
    >>> fairdiff_jax.Run("runs/first").report().as_posix()
    'runs/first/report'

    Args:
      data: another prepared directory; None for the run's own.
    """
    place = None if data is None else Path(data)
    return evaluate.report_directory(self.layout, place)

  def segment(
    self,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    probabilities: bool = False,
    batch_size: int | None = None,
  ) -> list[np.ndarray] | np.ndarray:
    """Masks of images, each at its own size.

    The same network, batches and numbers as in `evaluate`: prepared images get
    bit for bit the masks that the report is about.

    >>> import numpy as np
    >>> import fairdiff_jax
    >>> images = np.random.default_rng(0).random((2, 50, 60))
    >>> masks = fairdiff_jax.Run("runs/first").segment(images)
    >>> masks.shape, masks.dtype
    ((2, 50, 60), dtype('uint8'))

    Args:
      images: a list of images of any sizes, or an array of several of one: grey
        [H, W] or RGB [H, W, 3], each made what the run's domain has; uint8,
        floats from 0 to 1, or other numbers, which are scaled between their own
        0.5th and 99.5th percentile.
      probabilities: return these, float32 [H, W, classes], instead.
      batch_size: images at a time, all padded to so many; None for the run's
        `evaluation.batch_size`. It is compiled once for each.

    Returns:
      Classes uint8 [H, W], a list of a list, an array of an array.

    Raises:
      ValueError: what is no image, is smaller than the run's crop, or shows
        nothing; or the run has no segmenter.
    """
    whole = isinstance(images, np.ndarray)
    if isinstance(images, np.ndarray) and (
      images.ndim < 3 or (images.ndim == 3 and images.shape[-1] in (3, 4))
    ):
      raise ValueError(
        f"an array of shape {images.shape} is one image; give several, such as"
        " segment([image])"
      )
    found = self._predictor(batch_size).segment(
      [*images], probabilities=probabilities
    )
    return np.stack([*found]) if whole and len(images) else [*found]

  def sample(
    self, counts: Mapping[str, int] | Sequence[str], seed: int = 0
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labelled synthetic patients of some groups.

    They are those that `fairdiff sample` writes for the same counts and seed,
    where its gate lets all of them pass; these have passed none.

    >>> import fairdiff_jax
    >>> run = fairdiff_jax.Run("runs/first")
    >>> images, masks, groups = run.sample({"White": 1, "Asian": 2})
    >>> images.shape, masks.shape, groups.tolist()
    ((3, 32, 32), (3, 32, 32), ['Asian', 'Asian', 'White'])

    Args:
      counts: patients of each group, such as {'Asian': 64}, or ['Asian=64'].
      seed: of all noise.

    Returns:
      images uint8 [n, H, W] or RGB [n, H, W, 3], masks uint8 [n, H, W], and
      their groups' names [n], groups in the order of `groups`.

    Raises:
      ValueError: bad counts, a run without generators, or a mask that could not
        be drawn soundly.
    """
    if isinstance(counts, Mapping):
      counts = [f"{name}={count}" for name, count in counts.items()]
    wanted = export.parse_counts(counts, *self._vocabulary())
    group = np.repeat(
      np.array([*wanted], np.int32), np.array([*wanted.values()])
    )
    cases = self._generator(
      self.trained.inference, seed, np.arange(len(group)), group
    ).require_sound()
    return cases.image, cases.mask, np.array(self.groups)[group]

  def generate(
    self,
    masks: Sequence[np.ndarray] | np.ndarray,
    groups: Sequence[str] | str,
    seed: int = 0,
  ) -> np.ndarray:
    """Images of given masks, as patients of given groups.

    >>> import fairdiff_jax
    >>> run = fairdiff_jax.Run("runs/first")
    >>> images, masks, groups = run.sample({"Black": 1}, seed=3)
    >>> (run.generate(masks, groups, seed=3) == images).all()
    np.True_

    Args:
      masks: [n, H, W] classes, of the run's `data.size`.
      groups: names of the n groups, or one for all.
      seed: of all noise; that of a mask also depends on its place.

    Returns:
      uint8 [n, H, W] or RGB [n, H, W, 3].

    Raises:
      ValueError: masks of another size or with other classes, no such group, or
        a run without an image generator.
    """
    export.require_networks(self.trained, "image")
    masks = np.asarray(masks)
    size = tuple(self.config.data.size)
    if masks.ndim != 3 or masks.shape[1:] != size:
      raise ValueError(
        f"masks have shape {masks.shape}; give [n, {size[0]}, {size[1]}], the"
        " run's data.size"
      )
    most = self.domain.num_classes - 1
    if masks.size and not 0 <= masks.min() <= masks.max() <= most:
      raise ValueError(f"masks must hold classes from 0 to {most}")
    if isinstance(groups, str):
      groups = [groups] * len(masks)
    if len(groups) != len(masks):
      raise ValueError(f"{len(masks)} masks, but {len(groups)} groups")
    attribute, pooled, words = self._vocabulary()
    group = [group_code(attribute, str(g), pooled, words) for g in groups]
    return self._image_generator(
      self.trained.inference,
      seed,
      np.arange(len(masks)),
      np.array(group, np.int32),
      masks.astype(np.uint8),
    )

  def predict(
    self,
    images: str | os.PathLike,
    out: str | os.PathLike,
    *,
    batch_size: int | None = None,
  ) -> predict.Summary:
    """Writes the masks of a directory's images; see `fairdiff predict`.

    >>> import fairdiff_jax
    >>> done = fairdiff_jax.Run("runs/first").predict("photographs", "found")
    >>> done.segmented, [str(path) for path, reason in done.unreadable]
    (3, ['notes.txt'])

    Args:
      images: the directory, with its folders.
      out: where to write; new, empty, or of the same run and checkpoint.
      batch_size: as for `segment`.

    Returns:
      How many were segmented, and what could not be read.

    Raises:
      FileNotFoundError: there is no such directory, or nothing in it.
      FileExistsError: `out` holds something else.
      ValueError: a file in `out` is not what was written there.
    """
    return predict.predict(
      self.trained, self._predictor(batch_size), Path(images), Path(out)
    )

  def export(self, out: str | os.PathLike) -> None:
    """Writes what was learned for others to use; see `fairdiff export`.

    >>> import fairdiff_jax
    >>> fairdiff_jax.Run("runs/first").export("handed_over")

    Args:
      out: a directory that does not exist yet.

    Raises:
      FileExistsError: it exists.
    """
    handover.write(self.trained, Path(out))

  def _vocabulary(self):
    data = self.trained.config.data
    return data.attribute, data.pooled, vocabulary_of(data)

  def _predictor(self, batch_size: int | None) -> Predictor:
    batch_size = batch_size or self.config.evaluation.batch_size
    if batch_size not in self._predictors:
      self._predictors[batch_size] = Predictor(self.trained, batch_size)
    return self._predictors[batch_size]

  @functools.cached_property
  def _generator(self):
    export.require_networks(self.trained, "points", "image")
    return make_generator(self.trained.setup)

  @functools.cached_property
  def _image_generator(self):
    return make_image_generator(self.trained.setup)

  def _forget(self):
    """Forgets what was read, which training changes."""
    for name in ("trained", "_generator", "_image_generator"):
      self.__dict__.pop(name, None)
    self._predictors.clear()
