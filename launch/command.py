"""The command `fairdiff`: one of the launch scripts, by name.

fairdiff train --config phantom --workdir runs/quickstart
"""

import importlib
import sys

from fairdiff_jax import __version__

COMMANDS = {
  "prepare": "prepare a data set",
  "check": "say whether data can be used",
  "train": "train a run and report on it; the same command resumes it",
  "evaluate": "evaluate a run and write its report",
  "predict": "segment a directory of images",
  "sample": "draw labelled synthetic patients from a run",
  "compare": "compare runs by method",
  "study": "compare methods over seeds, on data or on phantoms",
  "export": "hand over weights, a program and a model card",
  "import-weights": "turn published weights into what image.weights names",
  "doctor": "say whether the devices at hand can be trusted",
  "compile": "compile the joint step for TPUs that are not here",
}


def main() -> None:
  """Runs the script that the first argument names."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name == "--version":
    print(__version__)
  elif name in ("--help", "-h", "help"):
    print("usage: fairdiff COMMAND [flags]; COMMAND --help has its flags\n")
    for command, summary in COMMANDS.items():
      print(f"  {command:<16}{summary}")
  elif name not in COMMANDS:
    known = ", ".join(COMMANDS)
    sys.exit(f"error: {name!r} is no command; there are {known}")
  else:
    module = f"fairdiff_jax.launch.{name.replace('-', '_')}"
    sys.argv = [f"fairdiff {name}", *sys.argv[2:]]
    importlib.import_module(module).start()
