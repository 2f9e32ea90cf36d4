"""Being asked to stop: SIGTERM, Ctrl-C (SIGINT), a closed terminal (SIGHUP)."""

import os
import signal
import stat
import time

import jax

from fairdiff_jax.training.mesh import all_hosts, from_first_host

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Hosts meet every so many seconds, but not less often than at so many steps.
INTERVAL, MOST_STEPS = 1.0, 20


class Termination:
  """Whether the run was asked to stop; calls give the same on all hosts.

  A second SIGINT ends the process at once. Signals that are ignored when the
  run starts, such as SIGHUP under nohup, stay ignored. JAX's own notice of
  SIGTERM is not used: hosts would agree on it by the number of a step, which
  Orbax counts as well, of steps that it is still saving.

  Attributes:
    reason: name of the signal.
  """

  def __init__(self):
    self._asked = False
    self.reason = "SIGTERM"
    self._previous = {
      number: signal.signal(number, self._ask)
      for number in SIGNALS
      if signal.getsignal(number) is not signal.SIG_IGN
    }
    self._met = time.monotonic()
    self._steps, self._every = 0, 1  # steps since hosts met, and until they do

  def _ask(self, number, _):
    self._asked = True
    self.reason = signal.Signals(number).name
    again = ""
    if number == signal.SIGINT:
      signal.signal(number, signal.SIG_DFL)
      again = "; once more: ends at once, unsaved"
    _tell(f"\n{self.reason}: about to save and stop{again}\n")

  def __call__(self) -> bool:
    """Asks all hosts, which must call it alike."""
    # What was asked is never cleared: a signal may come while hosts meet.
    asked = not all_hosts(not self._asked)
    self._met, self._steps, self._every = time.monotonic(), 0, 1
    return asked

  def at_step(self) -> bool:
    """The same before a step, but hosts meet only now and then.

    They would wait for the step under way.
    """
    self._steps += 1
    if jax.process_count() > 1 and self._steps < self._every:
      return False
    elapsed = from_first_host(int(1000 * (time.monotonic() - self._met)))
    every = int(1000 * INTERVAL * self._steps / max(elapsed, 1))
    asked = self()
    self._every = min(max(every, 1), MOST_STEPS)
    return asked

  def close(self):
    for number, handler in self._previous.items():
      signal.signal(number, handler)


def _tell(text: str):
  """Writes to stderr; if its terminal is gone, nothing will from now on."""
  try:
    os.write(2, text.encode())
  except OSError:  # as every later message, which must not end the run
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
      if stream == 2 or stat.S_ISCHR(os.fstat(stream).st_mode):
        os.dup2(null, stream)
    os.close(null)
