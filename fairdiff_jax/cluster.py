"""Processes of a cluster end together, and say which of them was the cause.

A process that is killed, stopped or ends by an error leaves the others in a
collective that never completes. So each process beats: it leaves a count and
its step with the coordinator, process 0, every tenth of the time-out. The
coordinator gives a verdict on who said that it failed, or was silent for the
time-out; all read it, print it with their stacks and exit with `RESTART`.
Whoever has no answer from the coordinator for as long does so as well.
"""

import faulthandler
import os
import sys
import threading
import time

RESTART = 75  # EX_TEMPFAIL: start the same command again
TIMEOUT = 60  # seconds
_ALL = "fairdiff_jax/"
_BEATS, _VERDICT = f"{_ALL}process_", f"{_ALL}verdict"
_DONE, _FAILED = "done", "failed: "


class Cluster:
  """This process among the others of `jax.distributed`.

  Args:
    client: of the coordinator's key-value store.
    process: index of this one.
    count: of processes.
    timeout: seconds.
    leave: called with the verdict, in a thread; the default ends the process.

  Attributes:
    step: the last one under way; told to the others.
  """

  def __init__(self, client, process, count, timeout=TIMEOUT, leave=None):
    self._client, self._process, self._count = client, process, count
    self._timeout, self._interval = timeout, timeout / 10
    self._leave = leave or _leave
    self._closed = threading.Event()
    self._answered = time.monotonic()
    self.step = 0
    self._threads = [
      threading.Thread(target=work, daemon=True)
      for work in (self._beat, self._listen)
    ]
    for thread in self._threads:
      thread.start()

  def fail(self, error: BaseException):
    """Tells the others of an error; returns when they can have heard."""
    self._stop()
    first = (str(error).splitlines() or [""])[0][:200]
    cause = f"{type(error).__name__}: {first}"
    if self._process:
      self._set(f"{_BEATS}{self._process}", f"{_FAILED}{cause}")
    else:
      self._set(_VERDICT, f"process 0 ended by {cause}")
      time.sleep(2 * self._interval)

  def blame(self):
    """Waits for a verdict, which ends this process.

    What fails in a collective is mostly another process, which is silent soon.
    """
    time.sleep(2 * self._timeout)

  def close(self):
    """This process has done its part: no more beats of it are awaited."""
    self._stop()
    self._set(f"{_BEATS}{self._process}", _DONE)

  def _stop(self):
    self._closed.set()
    for thread in self._threads:
      thread.join(self._interval)

  def _set(self, key, text):
    try:
      self._client.key_value_set(key, text, allow_overwrite=True)
    except Exception:  # the coordinator is gone
      return

  def _beat(self):
    judge = _Judge(self._count, self._timeout)
    number, verdict = 0, ""
    while not self._closed.is_set():
      try:
        self._client.key_value_set(
          f"{_BEATS}{self._process}",
          f"{number} {self.step}",
          allow_overwrite=True,
        )
        found = dict(self._client.key_value_dir_get(_ALL))
        self._answered = time.monotonic()
        verdict = found.get(_VERDICT, "")
        if not verdict and self._process == 0:
          verdict = judge(found, self._answered)
          if verdict:
            self._client.key_value_set(_VERDICT, verdict)
            self._closed.wait(2 * self._interval)  # the others read it here
      except Exception:  # no answer: `_listen` counts the seconds
        pass
      if verdict:
        self._closed.set()
        self._leave(verdict)
      number += 1
      self._closed.wait(self._interval)

  def _listen(self):
    """For the coordinator: a call to one that is stopped never returns."""
    woken = time.monotonic()
    while not self._closed.wait(self._interval):
      now = time.monotonic()
      if now - woken > self._timeout / 2:  # it was this one that was stopped
        self._answered = now
      woken = now
      if now - self._answered > self._timeout:
        self._closed.set()
        self._leave(
          f"process 0, the coordinator, has not answered for"
          f" {self._timeout:g} s; step {self.step} was under way"
        )


class _Judge:
  """Who is silent or has failed, by the beats of all; '' while nobody is."""

  def __init__(self, count, timeout):
    self._count, self._timeout = count, timeout
    self._heard = {}  # process -> its latest beat, and when it was new
    self._asked = None

  def __call__(self, beats, now):
    late = self._asked is not None and now - self._asked > self._timeout / 2
    self._asked = now
    for process in range(self._count):
      beat = beats.get(f"{_BEATS}{process}", "")
      if beat.startswith(_FAILED):
        return f"process {process} ended by {beat.removeprefix(_FAILED)}"
      known, since = self._heard.get(process, (None, now))
      if late or beat != known or beat == _DONE:
        since = now
      self._heard[process] = beat, since
      if now - since > self._timeout:
        step = beat.partition(" ")[2] or 0
        return (
          f"process {process} has been silent for {self._timeout:g} s, killed,"
          f" stopped or cut off; step {step} was under way there"
        )
    return ""


def _leave(verdict):
  faulthandler.dump_traceback()
  print(f"error: {verdict}", file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(RESTART)


_joined: Cluster | None = None


def join(
  coordinator: str | None,
  processes: int | None,
  process: int | None,
  *,
  timeout: float = TIMEOUT,
) -> None:
  """`jax.distributed.initialize`, and beats from now on.

  Args:
    coordinator: host:port of process 0; None where JAX finds it by itself.
    processes: number of processes, or None.
    process: index of this one, or None.
    timeout: seconds of silence after which the cluster ends.
  """
  global _joined
  import jax
  from jax._src import distributed  # the store has no public name

  jax.distributed.initialize(
    coordinator,
    processes,
    process,
    initialization_timeout=1800,  # of a queue whose machines come one by one
    heartbeat_timeout_seconds=int(2 * timeout) + 1,  # JAX's names nobody
  )
  state = distributed.global_state
  _joined = Cluster(
    state.client, state.process_id, state.num_processes, timeout
  )


def at(step: int) -> None:
  """Notes the step that is under way, for what is said if it is the last."""
  if _joined:
    _joined.step = step


def leave() -> None:
  """This process has done its part and waits for the others."""
  if _joined:
    _joined.close()


def fail(error: BaseException) -> None:
  """Tells the others of an error, if there are any, so that they end too."""
  if not _joined:
    return
  text = str(error)
  if "Gloo" in text or (
    type(error).__name__ == "JaxRuntimeError"
    and "RESOURCE_EXHAUSTED" not in text
  ):
    _joined.blame()
  _joined.fail(error)
