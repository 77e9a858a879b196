"""One trial: a run that is disturbed at random, taken up again, and compared with one that is not.

What a trial does is a function of (seed, number) alone; at which step of the run its process is met
depends on the machine.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from experiments.faults import setups
from experiments.faults.comparison import first_difference
from experiments.faults.processes import is_alive, kill, ranks_of, wait_for
from experiments.faults.setups import STEPS, Command, Setup, begun, run_directories
from experiments.faults.tearing import swap, tear
from experiments.runs.directory import is_locked

# A command that takes longer hangs.
LIMIT_S = 240.0
# How long what a dead supervisor leaves may live, and hold a lock.
GONE_S = 10.0
# torchrun gives ranks half a minute to end when it is told to.
TOLD_GONE_S = 45.0
USER_ERROR = 2


@dataclass
class Account:
    """What came of a trial.

    Attributes:
        trial: its number.
        kind: of the disturbance.
        outcome: `equal`: bit for bit as the undisturbed run; `differs`; `hangs`; `left behind`:
            processes or locks outlived their supervisor; `foreign file changed`; `not resumed`:
            the same command did not go on; `skipped`.
        signals: that were sent.
        refused: commands that ended with one line for the user, exit code 2.
        traces: commands whose output has a traceback.
        seconds: it took, the undisturbed run included where it was the first of its kind.
        detail: what was done, and what went wrong.
    """

    trial: int
    kind: str
    outcome: str = "equal"
    signals: int = 0
    refused: int = 0
    traces: int = 0
    seconds: float = 0.0
    detail: list[str] = field(default_factory=list)


class TrialError(Exception):
    """A trial did not end as it should; the first argument is the outcome."""


class Trial:
    """A folder with one disturbed run.

    Args:
        account: is filled.
        folder: empty; results, logs and what else the trial needs.
        reference: the results folder of an undisturbed run of a setup, made where it is absent.
        chance: decides everything.
    """

    def __init__(
        self,
        account: Account,
        folder: Path,
        reference: Callable[[Setup], Path],
        chance: random.Random,
    ):
        self.account = account
        self.folder = folder
        self.chance = chance
        self.results = folder / "results"
        self._reference = reference
        self._commands = 0

    def begin(self, setup: Setup) -> Command:
        """Start the command; its output goes to a file of its own."""
        self._commands += 1
        return Command(setup, self.results, self.folder / f"log{self._commands}.txt")

    def meet(self, command: Command, step: int) -> bool:
        """Wait until a run has a step on record; whether its command lives."""
        self.account.detail.append(f"step {step}")
        wait_for(
            lambda: setups.steps_on_record(self.results) >= step or not is_alive(command.pid),
            LIMIT_S,
        )
        command.family()
        return is_alive(command.pid)

    def send(self, pids: list[int], number: int, to: str) -> None:
        """Send a signal."""
        self.account.signals += len(pids)
        self.account.detail.append(f"{signal.Signals(number).name} to {to}")
        kill(pids, number)

    def ended(self, command: Command) -> int:
        """Wait for the end of a command, and look at what it said."""
        code = command.exit_code(LIMIT_S)
        said = command.log.read_text(errors="replace")
        if code is None:
            raise TrialError("hangs", said[-500:])
        self.account.traces += "Traceback" in said
        if code == USER_ERROR:
            self.account.refused += 1
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            self.account.detail.append(errors[-1] if errors else "exit code 2 without a word")
        return code

    def gone(self, command: Command, limit_s: float) -> None:
        """Check that nothing is left of a command whose supervisor is dead, and no lock held."""
        family = command.family()
        directories = run_directories(self.results)

        def left() -> list[int]:
            workers = [pid for directory in directories for pid in ranks_of(directory)]
            return [pid for pid in {*family, *workers} if is_alive(pid)]

        def is_over() -> bool:
            return not left() and not any(map(is_locked, directories))

        if not wait_for(is_over, limit_s):
            raise TrialError("left behind", f"{len(left())} processes after {limit_s:.0f} s")

    def run_to_end(self, setup: Setup) -> int:
        """Run the command undisturbed; returns its exit code."""
        command = self.begin(setup)
        try:
            return self.ended(command)
        finally:
            command.clear()

    def goes_on(self, setup: Setup) -> None:
        """Run the same command again and compare what it comes to with an undisturbed run."""
        code = self.run_to_end(setup)
        if code != 0:
            raise TrialError("not resumed", f"exit code {code}")
        self.compare(setup)

    def compare(self, setup: Setup) -> None:
        """Compare every run with the undisturbed one of the same name."""
        whole = self._reference(setup)
        names = [path.relative_to(whole) for path in run_directories(whole)]
        if names != [path.relative_to(self.results) for path in run_directories(self.results)]:
            raise TrialError("differs", "other runs")
        for name in names:
            found = first_difference(self.results / name, whole / name)
            if found is not None:
                raise TrialError("differs", f"{name}: {found}")

    def killed_somewhere(self, setup: Setup) -> Path:
        """Start the command and kill its one process at a random step; the run's directory."""
        command = self.begin(setup)
        try:
            if self.meet(command, self.chance.randrange(8, STEPS)):
                self.send([command.pid], signal.SIGKILL, "the process")
            command.exit_code(LIMIT_S)
        finally:
            command.clear()
        (directory,) = run_directories(self.results)
        return directory


def process(trial: Trial) -> None:
    """The process of a run is killed, once to three times."""
    setup = setups.alone(trial.chance.choice(setups.OPTIMIZERS))
    steps = sorted(trial.chance.sample(range(STEPS), trial.chance.randint(1, 3)))
    for step in steps:
        command = trial.begin(setup)
        try:
            if not trial.meet(command, step):
                break
            number = trial.chance.choice([signal.SIGKILL] * 4 + [signal.SIGTERM])
            trial.send([command.pid], number, "the process")
            command.exit_code(LIMIT_S)
            trial.gone(command, GONE_S)
        finally:
            command.clear()
    trial.goes_on(setup)


def rank(trial: Trial) -> None:
    """A rank is killed, once or twice; torchrun starts all of them anew."""
    setup = setups.ranks(trial.chance.choice(setups.SHARED))
    command = trial.begin(setup)
    try:
        for step in sorted(trial.chance.sample(range(1, STEPS), trial.chance.randint(1, 2))):
            if not trial.meet(command, step):
                break
            found = ranks_of(run_directories(trial.results)[0])
            if found:
                trial.send([trial.chance.choice(found)], signal.SIGKILL, "a rank")
                wait_for(partial(_are_gone, found), LIMIT_S)
        trial.ended(command)
    finally:
        command.clear()
    trial.goes_on(setup)


def agent(trial: Trial) -> None:
    """The torchrun of a run is killed; its ranks must end."""
    _supervisor(trial, lambda command: [pid for pid in command.family() if _is_agent(pid)])


def group(trial: Trial) -> None:
    """The launcher and the torchrun of a run, one process group, are killed."""
    _supervisor(trial, lambda command: [p for p in command.family() if _group(p) == command.pid])


def launcher(trial: Trial) -> None:
    """The launcher of a run is killed; torchrun and the ranks must end."""
    _supervisor(trial, lambda command: [command.pid], all_must_end=True)


def _supervisor(
    trial: Trial, victims: Callable[[Command], list[int]], *, all_must_end: bool = False
) -> None:
    """Kill who supervises.

    Args:
        trial: the trial.
        victims: the processes to kill.
        all_must_end: whether nothing of the command may outlive them; else it ends by itself.
    """
    setup = setups.ranks(trial.chance.choice(setups.SHARED))
    command = trial.begin(setup)
    try:
        if trial.meet(command, trial.chance.randrange(STEPS)):
            found = victims(command)
            trial.send(found, signal.SIGKILL, trial.account.kind)
            if all_must_end:
                trial.gone(command, TOLD_GONE_S)
        if not all_must_end:
            trial.ended(command)
            trial.gone(command, GONE_S)
    finally:
        command.clear()
    trial.goes_on(setup)


def parent(trial: Trial) -> None:
    """A campaign is killed or told to end, or a process of its pool is killed."""
    setup = setups.campaign()
    command = trial.begin(setup)
    try:
        if trial.meet(command, trial.chance.randrange(STEPS)):
            number = trial.chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            pool = [pid for pid in command.family() if pid != command.pid]
            if trial.chance.random() < 0.25 and pool:
                trial.send([trial.chance.choice(pool)], signal.SIGKILL, "a process of the pool")
            else:
                trial.send([command.pid], number, "the campaign")
        trial.ended(command)
        trial.gone(command, GONE_S)
    finally:
        command.clear()
    trial.goes_on(setup)


def full_disk(trial: Trial) -> None:
    """The results are on a file system of 4 MiB that becomes full; then room is made."""
    setup = setups.alone(trial.chance.choice(setups.OPTIMIZERS))
    trial.results.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(trial.results)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode != 0:
        raise TrialError("skipped", "no small file system can be mounted here")
    try:
        filler = trial.results / "filler"
        free = shutil.disk_usage(trial.results).free
        filler.write_bytes(bytes(max(0, free - trial.chance.randrange(4_000, 400_000))))
        code = trial.run_to_end(setup)
        trial.account.detail.append(f"exit code {code} on the full disk")
        filler.unlink()
        trial.goes_on(setup)
    finally:
        subprocess.run(["umount", "-l", str(trial.results)], check=False)


def link(trial: Trial) -> None:
    """A file of a killed run is swapped for a link to somebody else's."""
    setup = setups.alone(trial.chance.choice(setups.OPTIMIZERS))
    swapped = swap(trial.killed_somewhere(setup), trial.folder / "elsewhere", trial.chance)
    trial.account.detail.append(swapped.what)
    trial.run_to_end(setup)
    if not swapped.unharmed():
        raise TrialError("foreign file changed")
    swapped.restore()
    trial.goes_on(setup)


def torn_file(trial: Trial) -> None:
    """A file of a killed run is damaged; what a refusal asks for is done."""
    setup = setups.alone(trial.chance.choice(setups.OPTIMIZERS))
    damage = tear(trial.killed_somewhere(setup), trial.chance)
    trial.account.detail.append(damage.what)
    if trial.run_to_end(setup) != 0:
        damage.repair()
    trial.goes_on(setup)


KINDS: Mapping[str, Callable[[Trial], None]] = {
    "process": process,
    "rank": rank,
    "torchrun": agent,
    "process group": group,
    "launcher": launcher,
    "campaign": parent,
    "full disk": full_disk,
    "link": link,
    "torn file": torn_file,
}
# A cycle of trials: many of what takes a second or two, some of what starts torch again and again.
CYCLE = (
    *("process", "torn file", "link", "rank", "process", "full disk", "torn file", "torchrun"),
    *("process", "link", "campaign", "torn file", "process", "process group", "link", "torn file"),
    *("process", "full disk", "launcher", "campaign"),
)


def run_trial(
    number: int,
    *,
    seed: int,
    work: Path,
    reference: Callable[[Setup], Path],
    kinds: tuple[str, ...],
) -> Account:
    """Make a trial.

    Args:
        number: of the trial.
        seed: of the campaign.
        work: gets a folder for the trial, which stays where it did not end well.
        reference: gives the results folder of an undisturbed run of a setup.
        kinds: that take turns.
    """
    kind = kinds[number % len(kinds)]
    account = Account(number, kind)
    begin_s = time.monotonic()
    folder = work / f"trial{number:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chance = random.Random(f"{seed} {number}")
    try:
        KINDS[kind](Trial(account, folder, reference, chance))
    except TrialError as error:
        account.outcome = str(error.args[0])
        account.detail += map(str, error.args[1:])
    account.seconds = round(time.monotonic() - begin_s, 1)
    if account.outcome in ("equal", "skipped"):
        shutil.rmtree(folder)
    return account


def make_reference(setup: Setup, work: Path) -> Path:
    """The results folder of an undisturbed run of a setup, made where it is absent."""
    folder = work / "references" / setup.name.replace(" ", "-").replace(",", "")
    ended = folder / "ended"
    if not ended.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with begun(setup, folder / "results", folder / "log.txt") as command:
            code = command.exit_code(LIMIT_S)
        if code != 0:
            raise RuntimeError(f"the undisturbed run of {setup.name} ended with exit code {code}")
        ended.touch()
    return folder / "results"


def _is_agent(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"torch.distributed.run" in words


def _are_gone(pids: list[int]) -> bool:
    return not any(map(is_alive, pids))


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1
