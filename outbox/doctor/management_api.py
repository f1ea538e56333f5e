"""RabbitMQ's management API, read-only: for what AMQP can't tell."""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from outbox.doctor.finding import NotChecked
from outbox.errors import UsageError
from outbox.url import BrokerURL

__all__ = ["ManagementAPI"]

_TIMEOUT = 5.0  # seconds
_PORTS = {"amqp": ("http", 15672), "amqps": ("https", 15671)}
_MOST_BYTES = 32 * 1024 * 1024
_SERVER_ERROR = 500


class ManagementAPI:
    """The API of one broker, as one user. For one thread.

    Every method raises ``NotChecked`` if the API doesn't answer, or not this user.
    """

    def __init__(self, url: str, user: str, password: str, vhost: str) -> None:
        parts = urlsplit(url)
        self._base = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._headers = {"Authorization": f"Basic {token}", "Accept": "application/json"}
        self._vhost = quote(vhost, safe="")
        self.clock_difference: float | None = None

    @classmethod
    def open(cls, url: str | None, broker: BrokerURL, cluster: str) -> Self:
        """Return the API of the broker at ``broker``, after a first request.

        Args:
            url: its URL, in which a user and a password may stand; None to try the usual port on
                the broker's host.
            broker: the broker, whose user and password are the default.
            cluster: the name of the broker's cluster, by which it is recognised.

        Raises:
            NotChecked: it doesn't answer, or belongs to another broker.
            UsageError: the URL is not one.
        """
        how = "pass --management URL"
        if url is None:
            scheme, port = _PORTS[broker.scheme]
            host = broker.hosts[0][0]
            shown = f"[{host}]" if ":" in host else host
            api = cls(f"{scheme}://{shown}:{port}", broker.user, broker.password, broker.vhost)
        else:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UsageError("--management is not a URL such as http://localhost:15672")
            netloc = parts.netloc.rpartition("@")[2]
            user = unquote(parts.username) if parts.username else broker.user
            password = unquote(parts.password) if parts.password else broker.password
            api = cls(
                urlunsplit((parts.scheme, netloc, parts.path, "", "")), user, password, broker.vhost
            )
            how = "check --management"
        try:
            overview = api._get("overview")
        except NotChecked as error:
            raise NotChecked(f"no management API: {error}; {how}") from None
        name = overview.get("cluster_name", "")
        if cluster and name and name != cluster:
            raise NotChecked(f"the management API at {api._base} is another broker's; {how}")
        return api

    def queue(self, name: str) -> dict[str, Any] | None:
        """Return what the API says of a queue; None if there is none."""
        try:
            return dict(self._get(f"queues/{self._vhost}/{quote(name, safe='')}"))
        except FileNotFoundError:
            return None

    def bindings(self, queue: str) -> Sequence[tuple[str, str]]:
        """Return exchange and routing key of each binding of a queue."""
        try:
            found = self._get(f"queues/{self._vhost}/{quote(queue, safe='')}/bindings")
        except FileNotFoundError:
            return []
        return [(each["source"], each["routing_key"]) for each in found]

    def bound_queues(self, exchange: str) -> set[str]:
        """Return the names of the queues that are bound to an exchange."""
        try:
            path = f"exchanges/{self._vhost}/{quote(exchange, safe='')}/bindings/source"
            found = self._get(path)
        except FileNotFoundError:
            return set()
        return {each["destination"] for each in found if each["destination_type"] == "queue"}

    def consumers_of(self, queue: str) -> Sequence[Mapping[str, Any]]:
        """Return what the clients that consume from a queue say of themselves: properties."""
        details = (self.queue(queue) or {}).get("consumer_details", ())
        names = {each.get("channel_details", {}).get("connection_name") for each in details}
        found = self._get(f"vhosts/{self._vhost}/connections")
        return [each.get("client_properties", {}) for each in found if each.get("name") in names]

    def policies(self) -> Sequence[dict[str, Any]]:
        """Return the policies of the vhost, those of operators included."""
        found = list(self._get(f"policies/{self._vhost}"))
        with contextlib.suppress(NotChecked):  # only administrators may see them
            found += self._get(f"operator-policies/{self._vhost}")
        return found

    def failed_health_check(self, name: str) -> str | None:
        """Return why a health check of the node fails; None if it doesn't."""
        answer = self._get(f"health/checks/{name}", failed_too=True)
        return None if answer.get("status") == "ok" else str(answer.get("reason", "it fails"))

    def _get(self, path: str, *, failed_too: bool = False) -> Any:
        request = urllib.request.Request(f"{self._base}/api/{path}", headers=self._headers)
        try:
            began = time.time()
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                self._note_clock(response.headers.get("Date"), began)
                return json.loads(response.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                if failed_too and error.code > _SERVER_ERROR:
                    return json.loads(error.read(_MOST_BYTES))
            if error.code == 404:
                raise FileNotFoundError(path) from None
            if error.code in (401, 403):
                why = "the user may not use it (it needs the tag monitoring)"
            else:
                why = f"{error.code} {error.reason}"
        except ssl.SSLError as error:
            why = f"TLS failed: {error.reason}"
        except urllib.error.URLError as error:
            why = str(getattr(error.reason, "strerror", None) or error.reason)
        except (OSError, ValueError) as error:
            why = str(error) or type(error).__name__
        raise NotChecked(f"{self._base} does not answer: {why}")

    def _note_clock(self, date: str | None, began: float) -> None:
        if date is None or self.clock_difference is not None:
            return
        try:
            theirs = email.utils.parsedate_to_datetime(date)
        except ValueError:
            return
        if theirs.tzinfo is None:
            theirs = theirs.replace(tzinfo=datetime.UTC)
        middle = (began + time.time()) / 2
        # The header has whole seconds: on average it is half a second old.
        self.clock_difference = theirs.timestamp() + 0.5 - middle
