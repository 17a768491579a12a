import socket

import pytest

from animediffusion.platform.network import why_unreachable, without_password


def test_a_listener_is_reachable() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert why_unreachable(f"127.0.0.1:{port}") is None
        assert why_unreachable(f"http://127.0.0.1:{port}/path") is None


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:9", "does not answer (Connection refused)"),
        ("https://127.0.0.1:9", "does not answer (Connection refused)"),
        ("auto", "is not host:port"),
        ("127.0.0.1:99999", "is not host:port (Port out of range 0-65535)"),
    ],
)
def test_the_reason_is_given(address: str, reason: str) -> None:
    assert why_unreachable(address) == reason


def test_passwords_are_not_shown() -> None:
    assert without_password("postgresql://anna:secret@db/mlflow") == "postgresql://***@db/mlflow"
    assert without_password("http://127.0.0.1:5000/@x") == "http://127.0.0.1:5000/@x"
