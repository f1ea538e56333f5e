"""Requests each path of an application in this process, as its tests would.

Run as a program with the application's module, the client's name and the paths, it prints the
statuses as JSON, with null for a response that broke off.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import sys
from typing import Any

import httpx
from starlette.testclient import TestClient


def by_test_client(app: Any, paths: list[str]) -> dict[str, int | None]:
    statuses: dict[str, int | None] = dict.fromkeys(paths)
    with TestClient(app, raise_server_exceptions=False) as client:
        for path in paths:
            with contextlib.suppress(ValueError):  # raised when the response has begun
                statuses[path] = client.get(f"/{path}").status_code
        with client.websocket_connect("/websocket") as connection:
            for _ in range(2):
                connection.send_text("a message")
                assert connection.receive_text() == "done"
        assert client.portal is not None
        client.portal.call(asyncio.sleep, 0.5)
    return statuses


def by_httpx(app: Any, paths: list[str]) -> dict[str, int | None]:
    statuses: dict[str, int | None] = dict.fromkeys(paths)

    async def request_all() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            for path in paths:
                statuses[path] = (await client.get(f"/{path}")).status_code
        await asyncio.sleep(0.5)

    asyncio.run(request_all())
    return statuses


if __name__ == "__main__":
    module, name, *requested = sys.argv[1:]
    request = {"TestClient": by_test_client, "httpx": by_httpx}[name]
    print(json.dumps(request(importlib.import_module(module).app, requested)))
