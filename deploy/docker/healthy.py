"""Health of the process in this container: `healthy.py URL` exits 0 if the URL answers 200. Standard library only."""

import sys
import urllib.request

try:
    with urllib.request.urlopen(sys.argv[1], timeout=4) as answer:  # noqa: S310 the URL is in docker-compose.yml
        sys.exit(answer.status != 200)
except OSError as error:
    sys.exit(str(error))
