"""The outermost frame of a process that logs: a failed start is one line and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from slmops.contracts.errors import SlmopsError
from slmops.contracts.exit_codes import ExitCode
from slmops.kit.extras import not_installed


@contextmanager
def errors_as_one_line() -> Iterator[None]:
    """Prints an error of the tree, a missing module or Ctrl-C on stderr, and exits with its code."""
    try:
        yield
    except SlmopsError as error:
        _end(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        missing = not_installed(error)
        _end(str(missing), missing.exit_code)
    except KeyboardInterrupt:
        _end("Interrupted.", ExitCode.INTERRUPTED)


def _end(line: str, code: int) -> None:
    print(line, file=sys.stderr)
    sys.exit(code)
