"""One process of training: `python -m experiments.worker <run directory>`.

Reads the frozen config of the directory and trains it to its end. Exit status: 0 when the run is
done, diverged or out of time (`status.json` says which); 2 for a mistake of the user, told in one
line; 1 for anything unexpected, with the traceback in `traceback.txt`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import UserError
from experiments.run_directory import CONFIG_FILE
from experiments.spec import RunSpec


def run(directory: Path) -> None:
    """Train the run of a directory.

    Args:
        directory: a run directory with its `config.yaml`.

    Raises:
        UserError: there is no usable config, or it was edited after the directory was made.
    """
    spec = RunSpec.load(directory / CONFIG_FILE)
    if directory.resolve().name != spec.directory.name:
        raise UserError(
            f"{directory / CONFIG_FILE} was changed: it describes {spec.directory.name}, "
            f"not {directory.resolve().name}; restore it, or start the changed run with "
            "python -m experiments.train"
        )
    from experiments.trainer import Trainer  # torch is slow to import; mistakes are told before

    Trainer(spec, directory).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.worker", description=__doc__)
    parser.add_argument("directory", type=Path, help="a run directory with its config.yaml")
    directory: Path = parser.parse_args(arguments).directory
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        run(directory)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        logging.getLogger(__name__).exception("crashed: %s", directory)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
