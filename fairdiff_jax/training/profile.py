"""A trace of some steps: what devices and hosts do, for TensorBoard."""

from collections.abc import Callable
from pathlib import Path

import jax


class Profile:
  """Traces steps of the first host, once they are reached.

  Args:
    directory: where TensorBoard and Perfetto find it.
    steps: (from, to).
  """

  def __init__(self, directory: Path, steps: tuple[int, int]):
    self._directory, self._steps = directory, range(*steps)
    self._tracing = False

  def at(self, step: int, settle: Callable[[], None]):
    """Starts or stops before a step, if that is due.

    Args:
      step: the step.
      settle: waits for the step before.
    """
    due = jax.process_index() == 0 and step in self._steps
    if due == self._tracing:
      return
    settle()
    if due:
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # which would slow down what it shows
      jax.profiler.start_trace(self._directory, profiler_options=options)
      self._tracing = True
    else:
      self.close()

  def close(self):
    """Writes the trace, if one is under way."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
