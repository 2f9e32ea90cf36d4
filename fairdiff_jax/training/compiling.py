"""Compiling in the background, while earlier phases train."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from typing import Any

import jax


class Compiler:
  """Compiles one thing after another, in the order in which they are needed.

  Args:
    jobs: functions that compile, by what they give.

  Attributes:
    results: Future of every job.
    seconds: that the finished ones took.
  """

  def __init__(self, jobs: Mapping[Hashable, Callable[[], Any]]):
    self.results = {key: Future() for key in jobs}
    self.seconds = {}
    self._closed = False
    self._thread = threading.Thread(
      target=self._work, args=(dict(jobs),), daemon=True
    )
    self._thread.start()

  def _work(self, jobs):
    for key, job in jobs.items():
      if self._closed:
        return
      start = time.monotonic()
      try:
        result = job()
      except BaseException as error:
        self.results[key].set_exception(error)
      else:
        self.seconds[key] = time.monotonic() - start
        self.results[key].set_result(result)

  def close(self, status: int):
    """Stops; what is being compiled cannot be, and is not waited for.

    Args:
      status: that the process exits with if it ends before that is compiled.
        Python would abort: threads may not run on while it is taken down.
    """
    self._closed = True
    if self._thread.is_alive():
      atexit.register(self._leave, status)

  def _leave(self, status):
    if self._thread.is_alive():
      if jax.process_count() > 1:
        jax.distributed.shutdown()
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)
