"""Exit codes of the command line and of services, after sysexits.h where it has one."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    DONE = 0
    REFUSED = 1
    USAGE = 2
    NOT_COMPLETED = 3
    """A watched rollout ended without completing."""
    WRONG_INPUT = 65  # EX_DATAERR
    INTERNAL = 70  # EX_SOFTWARE: a defect of slmops
    TEMPORARY = 75  # EX_TEMPFAIL: try again
    NOT_PERMITTED = 77  # EX_NOPERM
    INTERRUPTED = 130  # 128 + SIGINT, as shells count
