"""WSGI applications, one for each kind of response that PEP 3333 knows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["BODIES"]

App = Callable[[dict[str, Any], Any], Iterable[bytes]]

_HEADERS = [("Content-Type", "text/plain"), ("X-A", "b")]


class _Closing:
    """An iterator with a ``close()``, as frameworks return it."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = iter(chunks)

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None: ...


class _Sized(_Closing):
    def __len__(self) -> int:
        return 1


def _returning(make: Callable[[], Iterable[bytes]], status: str = "200 OK", *headers: Any) -> App:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response(status, [*_HEADERS, *headers])
        return make()

    return app


def _generator(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", list(_HEADERS))
    yield b"one"
    yield b"two"


def _file(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115  the server closes it
    file.write(b"line\n" * 20_000)
    file.seek(0)
    start_response("200 OK", list(_HEADERS))
    body: Iterable[bytes] = environ["wsgi.file_wrapper"](file, 8192)
    return body


def _write(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", list(_HEADERS))(b"written")
    return [b"returned"]


def _restarted(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("500 Oops", list(_HEADERS))
    try:
        raise ValueError
    except ValueError as error:
        start_response("202 Accepted", [("X-Restarted", "yes")], (ValueError, error, None))
    return [b"restarted"]


def _raises(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", list(_HEADERS))
    raise ValueError("after start_response")


BODIES: dict[str, App] = {
    "closing": _returning(lambda: _Closing(b"one", b"two")),
    "empty": _returning(list, "204 No Content"),
    "empty chunks": _returning(lambda: _Closing(b"", b"one", b"")),
    "file": _file,
    "generator": _generator,
    "length": _returning(lambda: _Closing(b"one", b"two"), "200 OK", ("Content-Length", "6")),
    "list": _returning(lambda: [b"one", b"two"]),
    "list of one": _returning(lambda: [b"one"]),
    "raises": _raises,
    "restarted": _restarted,
    "sized": _returning(lambda: _Sized(b"one")),
    "tuple": _returning(lambda: (b"one",)),
    "write": _write,
}
"""The applications, by what is special about each."""
