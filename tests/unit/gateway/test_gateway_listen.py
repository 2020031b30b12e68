"""The API's socket."""

import pytest

from slmops.contracts.errors import PortTaken
from slmops.gateway.api.listen import listen


def test_the_error_names_a_taken_port() -> None:
    with listen() as first:
        first.listen()
        host, port = first.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(PortTaken, match=str(port)):
            listen(port=port)
