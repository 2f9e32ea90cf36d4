"""What the launch scripts share: flags, help, and errors as users read them.

A script's flags are absl's. One that takes a config asks `config()` for it: the
recipe that --config names, or else the config of the run in --workdir, with the
fields that --config.FIELD=VALUE changes, checked whole. Scripts import what is
slow to import in `main`, so that what is wrong with a command is said at once.
"""

import gc
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from fairdiff_jax import cluster, recipes
from fairdiff_jax import config as configs

flags.DEFINE_bool(
  "compilation_cache",
  True,
  "Keep compiled programs for the next start: in JAX_COMPILATION_CACHE_DIR, or"
  " else in the user's cache.",
)
CHECKPOINT = (  # a flag of all that use what a run has learned
  *("checkpoint", None),
  "best (on validation), last, or STEP; default best where there is one, else"
  " last.",
)
HELP = ("-h", "-help", "--help", "-helpfull", "--helpfull", "--helpshort")


def run(
  main: Callable[[Sequence[str]], int | None],
  *,
  takes_config: bool = False,
  arguments: str = "",
) -> None:
  """Parses the flags and calls `main`, whose result is the exit status.

  What the library raises for bad input, ValueError and OSError (such as
  FileNotFoundError), for a step that is not finite (FloatingPointError) and for
  an optional package that is missing (ImportError), and flags that cannot be
  read are printed as `error: ...` with exit status 1; --verbosity=1 shows their
  traceback. Anything else is a fault and keeps its traceback. Of a cluster, the
  other processes end as well.

  Args:
    main: called with the arguments that are no flags.
    takes_config: whether there is a config; `config()` returns it.
    arguments: what arguments besides flags are; '' where there are none.
  """
  if set(HELP) & set(sys.argv[1:]):
    print(_help(main.__module__, takes_config, arguments))
    return

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return _parse(list(argv), takes_config, arguments)
    except (flags.Error, ValueError, OSError) as error:
      sys.exit(_fail(error))

  def guarded(argv: Sequence[str]) -> int | None:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # the libraries' INFO is long
    if flags.FLAGS["compilation_cache"].value:
      keep_compiled()
    # A tenth of a start is to look for garbage in what is there to stay: what
    # is imported, and programs that are traced.
    gc.set_threshold(50_000)
    try:
      status = main(argv[1:])
      cluster.leave()
      return status
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
      logging.debug("Traceback", exc_info=True)
      return _fail(error)
    except Exception as error:
      if not _in_cluster():
        raise
      traceback.print_exc()
      return _fail(error)

  app.run(guarded, flags_parser=parse)


def keep_compiled() -> None:
  """Has JAX, not imported yet, keep what it compiles, for the user alone.

  Where JAX_COMPILATION_CACHE_DIR says, or else in XDG_CACHE_HOME or ~/.cache.
  Programs are code: a directory that others might write to is not used.
  """
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  directory = os.path.join(cache, "fairdiff_jax")
  try:
    os.makedirs(directory, mode=0o700, exist_ok=True)
    os.chmod(directory, 0o700)
  except OSError:  # no home, or not this user's
    return
  os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
  # Small programs are many, and most of a start.
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def config(*, optional: bool = False) -> ConfigDict | None:
  """The config that the command asks for; None if it is optional and absent.

  Raises:
    ValueError: it asks for none, or for one that cannot run.
  """
  asked = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
  if asked is None and optional:
    return None
  if asked is None:
    raise ValueError(
      "give --config NAME or FILE, or as --workdir the directory of a run"
    )
  configs.check(asked)
  return asked


def _parse(argv, takes_config, arguments):
  asked = None
  if takes_config:
    argv, named = _take(argv, "config")
    workdir = _take(argv, "workdir")[1]
    record = configs.find_record(workdir) if workdir else None
    if named is not None:
      asked = recipes.find(named)
    elif record:
      asked = record.config
    if asked is None and any("-config." in text for text in argv):
      raise ValueError(
        "--config.FIELD=VALUE changes a config: give --config FILE, or as"
        " --workdir the directory of a run"
      )
  flags.FLAGS.set_gnu_getopt(True)
  try:
    if asked is not None:
      config_flags.DEFINE_config_dict("config", asked, sys_argv=argv)
    argv = flags.FLAGS(argv)
  except AttributeError as error:
    # ml_collections, of --config.x: AttributeError(KeyError("'x' Did you ..."))
    cause = error.args[0]
    text = cause.args[0] if isinstance(cause, KeyError) else cause
    text = " ".join(str(text).split())
    raise ValueError(f"the config has no field {text}") from error
  stray = argv[1:]
  if stray and not arguments:
    raise ValueError(
      f"nothing is known of {' '.join(map(repr, stray))}: flags start with two"
      " hyphens, such as --config.seed=3, and lists are joined by commas, such"
      " as --counts Asian=2,Black=2"
    )
  return argv


def _take(argv, name):
  """Removes --name VALUE or --name=VALUE: (the rest, the value or None)."""
  rest, value, left = [], None, iter(argv)
  for text in left:
    if text in (f"--{name}", f"-{name}"):
      value = next(left, "")
    elif text.startswith((f"--{name}=", f"-{name}=")):
      value = text.partition("=")[2]
    else:
      rest.append(text)
  return rest, value


def _help(module, takes_config, arguments):
  script = sys.modules[module]
  lines = [script.__doc__ or "", "Flags:"]
  for flag in [
    *flags.FLAGS.get_key_flags_for_module(script),
    flags.FLAGS["compilation_cache"],
  ]:
    default = "" if flag.default is None else f" (default: {flag.default})"
    lines.append(f"  --{flag.name:<14} {flag.help}{default}")
  if arguments:
    lines += ["", f"Arguments: {arguments}"]
  if takes_config:
    lines.append(
      "  --config         Recipe, NAME or FILE, or with :VARIANT; else that"
      " of the run\n                   in --workdir."
    )
    lines += ["", "Recipes:"]
    for name, module in recipes.own():
      variants = ", ".join(filter(None, module.VARIANTS))
      summary = module.__doc__.splitlines()[0]
      lines.append(f"  {name}  {summary} Variants: {variants}")
    lines += ["", "Fields, with their defaults before a recipe changes them:"]
    lines += [
      f"  --config.{name}={field.default!r}\n      {field.doc}; {field.allowed}"
      for name, field in configs.all_fields().items()
    ]
  return "\n".join(lines)


def _in_cluster() -> bool:
  jax = sys.modules.get("jax")
  return bool(jax and jax.distributed.is_initialized())


def _fail(error: Exception) -> int:
  lines = [line.rstrip() for line in str(error).splitlines()]
  print("error:", "\n".join(filter(None, lines)), file=sys.stderr)
  if _in_cluster():
    # An orderly end would wait for the other processes, which wait for this.
    sys.stdout.flush()
    sys.stderr.flush()
    cluster.fail(error)
    os._exit(1)
  return 1
