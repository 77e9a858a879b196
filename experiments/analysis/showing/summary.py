"""Judge one experiment: read its runs, write tables, figures and curves, print the summary."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.analysis.judging.claims import DEFAULT_CLAIMS, load_claims, settling_commands
from experiments.analysis.judging.verdicts import Verdict, judge_experiment
from experiments.analysis.measuring.contrasts import gain_lines
from experiments.analysis.measuring.curvature import summarise_curvature
from experiments.analysis.measuring.groups import Results, group_runs
from experiments.analysis.measuring.runs import load_runs
from experiments.analysis.showing.csv_files import comparison_csv, curves_csv, results_csv
from experiments.analysis.showing.tables import (
    TERMINAL_WIDTH,
    Table,
    comparison_table,
    headline_table,
    result_tables,
)
from experiments.errors import UserError
from experiments.runs.atomic import UnwritableError
from experiments.runs.owned_folder import OwnedFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """The judged comparison.

    Attributes:
        experiment: name of the experiment.
        results: the runs, one entry per scale.
        verdicts: of every claim about the experiment, at every scale.
        paths: the files written.
        unwritten: why there are none, where this user may not write them; else "".
    """

    experiment: str
    results: tuple[Results, ...]
    verdicts: tuple[Verdict, ...]
    paths: tuple[Path, ...]
    unwritten: str = ""

    def terminal(self) -> str:
        """The summary as text of at most 100 columns."""
        blocks: list[str] = []
        for results in self.results:
            families = results.families()
            blocks += [table.terminal() for each in families for table in result_tables(each)]
            blocks += _bullets("Gain", [line for each in families for line in gain_lines(each)])
            blocks += _bullets("Curvature", curvature_lines(results))
            blocks += _bullets("About the runs", results.problems)
        if self.verdicts:
            blocks.append(self._comparison().terminal())
            blocks += _bullets("Verdicts", verdict_lines(self.verdicts))
        else:
            blocks.append(_no_claim(self.experiment) + "\n")
        return "\n".join(blocks).rstrip() + "\n"

    def markdown(self) -> str:
        """The summary as Markdown, with the figures as relative links."""
        blocks = [f"# {self.experiment}\n"]
        for results in self.results:
            blocks.append(f"## {results.scale.capitalize()} scale\n")
            families = results.families()
            blocks += [table.markdown() for each in families for table in result_tables(each)]
            for path in self.paths:
                if path.suffix == ".svg" and path.stem.endswith(f"-{results.scale}"):
                    blocks.append(f"![{path.stem}, {results.scale} scale]({path.name})\n")
            gains = [line for each in families for line in gain_lines(each)]
            blocks += _markdown_list("Gain", gains)
            blocks += _markdown_list("Curvature", curvature_lines(results))
            blocks += _markdown_list("About the runs", results.problems)
        blocks.append("## Paper and ours\n")
        if self.verdicts:
            blocks.append(self._comparison().markdown())
            blocks += _markdown_list("Verdicts", verdict_lines(self.verdicts))
        else:
            blocks.append(_no_claim(self.experiment) + "\n")
        return "\n".join(blocks)

    def _comparison(self) -> Table:
        return comparison_table(self.verdicts, self.experiment)


def summary_folder(results_dir: Path, experiment: str, scale: str) -> Path:
    """Where the summary of an experiment goes: one folder a scale, since scales are never mixed."""
    return results_dir / "summary" / f"{experiment}-{scale}"


def summarise(
    results_dir: Path | str,
    experiment: str,
    out_dir: Path | str,
    *,
    scale: str | None = None,
    keys: Collection[str] | None = None,
    claims_path: Path = DEFAULT_CLAIMS,
) -> Summary:
    """Judge one experiment from its run directories alone.

    Args:
        results_dir: the directory that holds `runs/`.
        experiment: name of the experiment.
        out_dir: where summary.md, headline.md, the CSV files and the figures go.
        scale: judge the runs of this scale only; None: each scale for itself.
        keys: judge the runs with these run keys only.
        claims_path: the registry of claims.

    Returns:
        The summary, with the paths of the files; without them where this user may not write there.

    Raises:
        UserError: no such runs, a file that cannot be read, or a directory that cannot be written
            or holds files of these names from elsewhere.
    """
    # Drawing takes most of the import time; a message about a wrong name need not wait for it.
    found = load_runs(Path(results_dir), experiment, scale=scale, keys=keys)
    if not found.runs:
        what = f"{experiment!r} at {scale} scale" if scale else repr(experiment)
        details = f" ({'; '.join(found.problems)})" if found.problems else ""
        raise UserError(f"no runs of experiment {what} in {Path(results_dir) / 'runs'}{details}")
    results = group_runs(found)
    verdicts = judge_experiment(load_claims(claims_path), experiment, results)
    for line in (line for entry in results for line in entry.problems):
        logger.info("%s", line)
    judged = Summary(experiment, results, verdicts, ())
    out, above = Path(out_dir), Path(results_dir)
    try:
        folder = OwnedFolder(out, below=above if out.is_relative_to(above) else None)
        return _write(judged, folder)
    except UnwritableError as error:
        if not error.forbidden:
            raise
        return replace(judged, unwritten=str(error))


def _write(judged: Summary, folder: OwnedFolder) -> Summary:
    """Write the files of a summary; returns it with their paths."""
    results, verdicts = judged.results, judged.verdicts
    tables = {
        "headline.md": "\n".join(
            headline_table(family).markdown() for entry in results for family in entry.families()
        ),
        "table.csv": results_csv(results),
        "comparison.csv": comparison_csv(verdicts),
        "curves.csv": curves_csv(results),
    }
    folder.claim(["summary.md", *tables])
    paths = [*_write_figures(results, folder.path), *folder.replace(tables)]
    summary = replace(judged, paths=(folder.path / "summary.md", *paths))
    folder.replace({"summary.md": summary.markdown()})
    return summary


def curvature_lines(results: Results) -> tuple[str, ...]:
    """What the curvature did, one sentence per quasi-Newton group."""
    lines = []
    for group in results.groups:
        curvature = summarise_curvature(group)
        if curvature is not None:
            lines.append(f"{group.label} ({group.scale} scale): {curvature.words()}")
    return tuple(lines)


def verdict_lines(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """Counts of the verdicts, then what is open, with the command that would settle it."""
    counts: dict[str, int] = {}
    for verdict in verdicts:
        counts[str(verdict)] = counts.get(str(verdict), 0) + 1
    lines = [", ".join(f"{count} {outcome}" for outcome, count in counts.items())]
    for verdict in verdicts:
        if verdict.outcome in ("not run", "inconclusive") and verdict.reason:
            lines.append(f"{verdict.claim.id}: {verdict}: {verdict.reason}")
    claims = [verdict.claim for verdict in verdicts if verdict.command]
    lines += [f"to settle at full scale: {command}" for command in settling_commands(claims)]
    return tuple(lines)


def _write_figures(results: Sequence[Results], out: Path) -> list[Path]:
    from experiments.analysis.showing.figures import write_figures

    return [path for entry in results for path in write_figures(entry, out)]


def _no_claim(experiment: str) -> str:
    return f"No claim in results/claims.yaml is about {experiment}: there is nothing to compare."


def _bullets(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    body = "\n".join(_wrapped(line) for line in lines)
    return [f"{title}\n{body}\n"]


def _wrapped(line: str) -> str:
    return textwrap.fill(
        line,
        TERMINAL_WIDTH,
        initial_indent="- ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )


def _markdown_list(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"] if lines else []
