"""A private RabbitMQ with the management plugin, set up through its API."""

from __future__ import annotations

import base64
import json
import urllib.request
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

from outbox.testing.broker import PrivateBroker
from outbox.testing.servers import free_ports

__all__ = ["ManagedBroker"]


class ManagedBroker(PrivateBroker):
    """A broker whose management API is at :attr:`management`."""

    def _prepare(self, folder: Path) -> None:
        super()._prepare(folder)
        with free_ports(1) as (port,):
            self.management_port = port
        with (folder / "rabbitmq.conf").open("a") as config:
            config.write(f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {port}\n")
            config.write("collect_statistics_interval = 250\n")
        (folder / "plugins").write_text("[rabbitmq_management].\n")

    @property
    def management(self) -> str:
        """The URL of the API, for the user guest."""
        return f"http://guest:guest@127.0.0.1:{self.management_port}"

    def put(self, path: str, **values: Any) -> None:
        """Create what ``path`` names."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.management_port}/api/{path}",
            json.dumps(values).encode(),
            {
                "Authorization": f"Basic {base64.b64encode(b'guest:guest').decode()}",
                "Content-Type": "application/json",
            },
            method="PUT",
        )
        with urllib.request.urlopen(request, timeout=20):
            pass

    def new_vhost(self) -> str:
        """Create an empty vhost, and return its name."""
        vhost = f"doctor-{uuid.uuid4().hex[:12]}"
        self.put(f"vhosts/{vhost}")
        self.permit("guest", vhost)
        return vhost

    def permit(
        self, user: str, vhost: str, configure: str = ".*", write: str = ".*", read: str = ".*"
    ) -> None:
        """Give a user these permissions in a vhost."""
        self.put(f"permissions/{vhost}/{user}", configure=configure, write=write, read=read)

    def new_user(self, vhost: str, **permissions: str) -> str:
        """Create a user with the password ``secret`` and permissions; return the user's URL."""
        user = f"user-{uuid.uuid4().hex[:8]}"
        self.put(f"users/{user}", password="secret", tags="monitoring")
        self.permit(user, vhost, **permissions)
        return f"amqp://{user}:secret@127.0.0.1:{self.port}/{vhost}"

    def url_of(self, vhost: str) -> str:
        """Return the URL of a vhost, for the user guest."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{vhost}"

    def give_policy(self, vhost: str, pattern: str, **definition: Any) -> None:
        """Create a policy for queues."""
        self.put(
            f"policies/{vhost}/{quote(pattern, safe='')}",
            pattern=pattern,
            definition={key.replace("_", "-"): value for key, value in definition.items()},
            **{"apply-to": "queues"},
        )
