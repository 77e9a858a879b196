"""What is generated, and what is done with it."""

from __future__ import annotations

from tests.fuzzing.campaign import Subject
from tests.fuzzing.command_lines import COMMAND_LINES, run_command
from tests.fuzzing.data_files import IMAGES, PARQUET, read_image, read_parquet
from tests.fuzzing.results import CLAIMS, RUN_DIRECTORIES, judge_claims, template, use_run

SUBJECTS = (
    Subject("command lines", COMMAND_LINES, run_command),
    Subject("run directories", RUN_DIRECTORIES, use_run, template),
    Subject("claims", CLAIMS, judge_claims, template),
    Subject("parquet", PARQUET, read_parquet),
    Subject("images", IMAGES, read_image),
)
