"""The program `slmops`. It handles Ctrl-C before it imports the command line, which takes most of a second."""

from __future__ import annotations

from slmops.console.interrupt import end_at_once


def main() -> None:
    end_at_once()
    from slmops.console.app import main as run

    run()


if __name__ == "__main__":
    main()
