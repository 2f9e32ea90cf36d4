"""Running a launch script: user errors as one line, others as a traceback."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging


def run(main: Callable[[Sequence[str]], int | None]) -> None:
  """Parses the flags and calls `main`, whose result is the exit status.

  What the library raises for bad input, ValueError and OSError (such as
  FileNotFoundError), for a step that is not finite (FloatingPointError), for
  an optional package that is missing (ImportError), and a flag that names no
  field of the config are printed as one line, `error: ...`, with exit status
  1; --verbosity=1 shows their traceback. Anything else is a fault and keeps
  its traceback.
  """

  def guarded(argv: Sequence[str]) -> int | None:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # the libraries' INFO is long
    try:
      return main(argv)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
      logging.debug("Traceback", exc_info=True)
      return _fail(str(error))

  app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    return app.parse_flags_with_usage(argv)
  except AttributeError as error:
    # ml_collections, of --config.x: AttributeError(KeyError("'x' Did you ..."))
    cause = error.args[0]
    text = cause.args[0] if isinstance(cause, KeyError) else cause
    sys.exit(_fail(f"the config has no field {text}"))


def _fail(message: str) -> int:
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  return 1
