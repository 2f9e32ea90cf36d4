"""Being asked to stop: SIGTERM, Ctrl-C (SIGINT), a closed terminal (SIGHUP)."""

import itertools
import os
import signal
import stat

import jax
from jax.experimental import multihost_utils

# Hosts agree on the number of the call at which all of them stop.
_CALLS = itertools.count(1)


class Termination:
  """Whether the run was asked to stop; calls give the same on all hosts.

  A second SIGINT ends the process at once. Signals that are ignored when the
  run starts, such as SIGHUP under nohup, stay ignored.

  Attributes:
    reason: name of the signal.
  """

  def __init__(self):
    self._alone = jax.process_count() == 1
    self._asked = False
    self.reason = "SIGTERM"
    signals = [signal.SIGINT, signal.SIGHUP]
    if self._alone:  # else JAX waits for it, to tell the other hosts
      signals.append(signal.SIGTERM)
    self._previous = {
      number: signal.signal(number, self._ask)
      for number in signals
      if signal.getsignal(number) is not signal.SIG_IGN
    }

  def _ask(self, number, _):
    self.reason = signal.Signals(number).name
    again = ""
    if number == signal.SIGINT:
      signal.signal(number, signal.SIG_DFL)
      again = "; once more: ends at once, unsaved"
    _tell(f"\n{self.reason}: about to save and stop{again}\n")
    if self._alone:
      self._asked = True
    else:
      os.kill(os.getpid(), signal.SIGTERM)

  def __call__(self) -> bool:
    """To be called equally often by all hosts."""
    if not self._alone and not self._asked:
      self._asked = multihost_utils.reached_preemption_sync_point(next(_CALLS))
    return self._asked

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
