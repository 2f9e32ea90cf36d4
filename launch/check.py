"""Says whether data can be used, and which cases cannot; writes nothing.

  fairdiff check cases.csv

Takes a table, a directory of npz files in FairSeg's form, or prepared data.
"""

from fairdiff_jax.launch import cli


def main(sources):
  if not sources:
    raise ValueError("name a table, a directory of npz files, or prepared data")
  from fairdiff_jax.data import prepare

  reports = [prepare.check(source) for source in sources]
  print(*reports, sep="\n\n")
  return 0 if all(report.usable for report in reports) else 1


def start():
  cli.run(main, arguments="tables or directories")


if __name__ == "__main__":
  start()
