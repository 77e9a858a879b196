"""One process of training: `python -m experiments.worker <run directory>`.

Reads the frozen config of the directory and trains it to its end. Started by torchrun
(`torchrun --nproc-per-node=8 -m experiments.worker <run directory>`) it is one rank of several.

Exit status: 0 when the run is done, diverged or out of time (`status.json` says which), or when a
signal to another rank has ended it; 2 for a mistake of the user, told in one line; 1 for anything
unexpected, with the traceback in `traceback.txt`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.entry import entry
from experiments.errors import UserError
from experiments.given import user_path
from experiments.runs.directory import CONFIG_FILE
from experiments.runs.outcome import USER_ERROR, recorded_mistake
from experiments.runs.spec import RunSpec
from experiments.supervision import end_with_parent


def run(directory: Path) -> None:
    """Train the run of a directory.

    Args:
        directory: a run directory with its `config.yaml`.

    Raises:
        UserError: there is no usable config, or it was edited after the directory was made.
    """
    if directory.is_symlink():  # named by the user: the directory that it leads to is meant
        directory = directory.resolve()
    spec = RunSpec.load(directory / CONFIG_FILE)
    if directory.resolve().name != spec.directory.name:
        raise UserError(
            f"{directory / CONFIG_FILE} was changed: it describes {spec.directory.name}, "
            f"not {directory.resolve().name}; restore it, or start the changed run with "
            "python -m experiments.train"
        )
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and recorded_mistake(directory):
        raise SystemExit(USER_ERROR)  # it was told when torchrun started the ranks before
    # torch is slow to import; mistakes are told before
    from experiments.training.ranks import DEFAULT_TIMEOUT_S, LostRankError, join_ranks
    from experiments.training.task import choose_device
    from experiments.training.trainer import Trainer

    on_gpu = choose_device(spec.config.train.device).type == "cuda"
    timeout_s = float(spec.config.launch.get("timeout_s", DEFAULT_TIMEOUT_S))
    with join_ranks(use_gpu=on_gpu, timeout_s=timeout_s) as ranks:
        try:
            Trainer(spec, directory, ranks=ranks).run()
        except UserError as error:
            if ranks.tells(error):
                raise
            raise SystemExit(USER_ERROR) from error
        except LostRankError as error:
            print(f"error: rank {ranks.rank}: {error}", file=sys.stderr)
            raise SystemExit(1) from error


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.worker", description=__doc__)
    parser.add_argument("directory", type=user_path, help="a run directory with its config.yaml")
    directory: Path = parser.parse_args(arguments).directory
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # torchrun gives each rank a session, which nobody's signals reach
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        run(directory)
    except UserError:
        raise
    except KeyboardInterrupt:
        return 130
    except Exception:
        logging.getLogger(__name__).exception("crashed: %s", directory)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
