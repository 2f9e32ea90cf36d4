"""The loop: one for joint, staged and plain segmentation training.

At every step: stop if asked to, validate if due, save if due, mix the
segmenter's cases anew if due, take the batch, step, log. Everything a step
needs is a function of (config, data, step, state, bank), so that a run stopped
at any moment goes on from its last checkpoint to the very same parameters.
"""

import time
from collections.abc import Callable
from pathlib import Path

from jax.profiler import StepTraceAnnotation

from fairdiff_jax.data.cases import Cases
from fairdiff_jax.data.loader import Prefetcher
from fairdiff_jax.training.banks import Synthetic
from fairdiff_jax.training.goodput import Stopwatch
from fairdiff_jax.training.schedule import active_networks, due
from fairdiff_jax.training.session import Asked, Session
from fairdiff_jax.training.setup import Setup
from fairdiff_jax.training.step import TrainState


def train(
  config,
  workdir: str | Path,
  cases: Cases,
  *,
  data: str = "",
  make_refill: Callable[[Setup, Cases], Callable[..., Synthetic | None]]
  | None = None,
  make_validate: Callable[[Setup], Callable[[TrainState], dict[str, float]]]
  | None = None,
  name: str = "train",
  proceed: bool = False,
) -> TrainState | None:
  """Trains, or goes on training, a run.

  Args:
    config: the run's config.
    workdir: the run's directory, shared by all hosts.
    cases: training cases.
    data: digest of the prepared data; a run goes on with the same ones. '' for
      any.
    make_refill: (setup, cases) -> ((state, step, sizes [G], quota [G],
      directory, stop=, say=) -> Synthetic), which fills a bank, or gives None
      if `stop()`; None for runs without a bank.
    make_validate: setup -> (state -> what validation found, by the log's names,
      `validation.SCORE` among them; the same on every host); None for runs
      without validation.
    name: what the progress bar calls the run.
    proceed: whether the run may go on with another config or other data than it
      had, as far as its networks and optimisers keep their shapes.

  Returns:
    The final state, that of `train.steps` or of the validation at which
    patience ended, or None if the run was asked to stop: by SIGTERM, SIGINT
    or SIGHUP, upon which it saves.

  Raises:
    ValueError: if the config cannot run, the work directory belongs to another
      one, or a group has no case.
    OSError: if a checkpoint cannot be written.
    FloatingPointError: if a step's loss, gradients or new parameters are not
      finite.
  """
  clock = Stopwatch()
  with clock("init"):
    session = Session(
      *(config, Path(workdir), cases, data),
      *(make_refill, make_validate, name, proceed, clock),
    )
  start, total, pools = session.start, config.train.steps, session.pools
  prefetch = Prefetcher(pools.batch)
  try:
    for step in range(start, total):
      session.stop_if_asked()
      session.validate(step)
      if session.exhausted:
        return session.complete()
      if step > start and due(step, config.checkpoint.every):
        session.save()
      if not pools.ready(step):
        session.mix(step)
      active = active_networks(config, step)
      advance = session.compiled(active)
      session.profile(step)
      began = time.monotonic()
      following = step + 1
      known = following < total and pools.ready(following)
      with clock("data"):
        batch = prefetch(step, following=following if known else None)
      with clock("step"), StepTraceAnnotation("train", step_num=step):
        session.advance(step, *advance(session.state, batch))
      # What was waited for is the step before, of this phase or another.
      alike = step > start and active == active_networks(config, step - 1)
      session.tick(active, time.monotonic() - began if alike else None)
      session.log(step, batch)
    session.validate(total)
    return session.complete()
  except Asked:
    return session.leave()
  finally:
    prefetch.close()
    session.close()
