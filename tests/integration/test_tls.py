"""TLS, clients' certificates, and what is said when a connection cannot be negotiated."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox import ConnectFailed, Event, Publisher, UsageError
from outbox.doctor.examination import examine
from outbox.doctor.examined import SetUp
from outbox.tap import Tap
from outbox.testing.broker import BrokerMissing, PrivateBroker
from outbox.testing.servers import free_ports

USER = "shop"
_CONFIG = """
listeners.ssl.1 = 127.0.0.1:{port}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/server.pem
ssl_options.keyfile = {folder}/server.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
ssl_cert_login_from = common_name
auth_mechanisms.1 = EXTERNAL
auth_mechanisms.2 = PLAIN
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def make_certificates(folder: Path) -> None:
    """Make an authority, a server's certificate for 127.0.0.1, and a client's for the user."""
    ca, key = f"{folder}/ca.pem", f"{folder}/ca.key"
    common = ("-newkey", "rsa:2048", "-nodes", "-days", "2")
    # Python 3.13 verifies strictly (RFC 5280, sections 4.2.1.1 and 4.2.1.3).
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    run("openssl", "req", "-x509", *common, "-keyout", key, "-out", ca, "-subj", "/CN=test", *usage)
    for name, subject, extension in (
        ("server", "/CN=127.0.0.1", "subjectAltName=IP:127.0.0.1"),
        ("client", f"/CN={USER}", "extendedKeyUsage=clientAuth"),
    ):
        request, extensions = f"{folder}/{name}.csr", folder / f"{name}.ext"
        extensions.write_text(f"{extension}\nauthorityKeyIdentifier=keyid\n")
        own = f"{folder}/{name}.key"
        run("openssl", "req", *common, "-keyout", own, "-out", request, "-subj", subject)
        sign = ("openssl", "x509", "-req", "-in", request, "-CA", ca, "-CAkey", key, "-days", "2")
        out = f"{folder}/{name}.pem"
        run(*sign, "-CAcreateserial", "-out", out, "-extfile", str(extensions))
    for file in folder.iterdir():
        file.chmod(0o644)


class TLSBroker(PrivateBroker):
    """A node that demands clients' certificates on a second port, and takes them as a login."""

    tls_port = 0

    def __init__(self, certificates: Path) -> None:
        super().__init__()
        self._certificates = certificates

    def _prepare(self, folder: Path) -> None:
        super()._prepare(folder)
        with free_ports(1) as (self.tls_port,):
            pass
        config = folder / "rabbitmq.conf"
        visible = shutil.copytree(self._certificates, folder / "tls")
        own = _CONFIG.format(port=self.tls_port, folder=self._path_inside(visible))
        config.write_text(config.read_text() + own)
        (folder / "plugins").write_text("[rabbitmq_auth_mechanism_ssl].\n")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    return folder


@pytest.fixture(scope="module")
def tls_broker(certificates: Path) -> Iterator[TLSBroker]:
    try:
        broker = TLSBroker(certificates)
    except BrokerMissing as error:
        pytest.skip(str(error))
    with broker:
        broker.ctl("add_user", USER, "unused")
        broker.ctl("set_permissions", USER, ".*", ".*", ".*")
        yield broker


def found(url: str) -> list[str]:
    diagnosis = examine(SetUp(url=url, management="http://127.0.0.1:9"))
    return [f"{each.check.code} {each.problem.text}" for each in diagnosis.findings]


@pytest.mark.slow
def test_the_doctor_names_what_is_wrong_with_certificates(
    tls_broker: TLSBroker, certificates: Path
) -> None:
    address = f"127.0.0.1:{tls_broker.tls_port}"
    authority = f"cafile={certificates}/ca.pem"
    client = f"certfile={certificates}/client.pem&keyfile={certificates}/client.key"
    [expires] = found(f"amqps://{address}/?{authority}&{client}&auth=external")
    assert re.fullmatch(rf"OBX102 the certificate of {address} expires in [12] days", expires)
    [unknown] = found(f"amqps://{address}/")
    assert re.match(rf"OBX102 the certificate of {address} is refused: .*certificate", unknown)
    [other] = found(f"amqps://localhost:{tls_broker.tls_port}/?{authority}&{client}")
    assert "localhost" in other
    assert "is refused" in other
    assert any(
        "demands a client's certificate" in each or "may demand" in each
        for each in found(f"amqps://{address}/?{authority}")
    )
    [plain] = found(f"amqp://{address}/")
    assert plain == f"OBX102 {address} speaks TLS"


def first_error(url: str) -> str:
    [event] = [Event(id="1", target="x", exchange="", body=b"", unroutable="ignore")]
    with Publisher(url, drain_timeout=0) as publisher:
        error = publisher.publish([event]).error
    assert isinstance(error, ConnectFailed), error
    return str(error)


def test_a_clients_certificate_is_enough_to_log_in(
    tls_broker: TLSBroker, certificates: Path
) -> None:
    files = f"cafile={certificates}/ca.pem&certfile={certificates}/client.pem"
    files += f"&keyfile={certificates}/client.key"
    address = f"amqps://127.0.0.1:{tls_broker.tls_port}/"
    event = Event(id="1", target="x", exchange="outbox", body=b"", unroutable="ignore")
    with Publisher(f"{address}?{files}&auth=external") as publisher:
        assert publisher.publish([event]).ignored == (event,)
        connected = tls_broker.ctl("list_connections", "user", "auth_mechanism", "--silent")
        assert connected.split() == [USER, "EXTERNAL"]

    async def tap() -> str:
        async with Tap(url=f"{address}?{files}&auth=external"):
            return await asyncio.to_thread(
                tls_broker.ctl, "list_connections", "user", "auth_mechanism", "--silent"
            )

    assert asyncio.run(tap()).split() == [USER, "EXTERNAL"]


def test_a_missing_clients_certificate_is_named(tls_broker: TLSBroker, certificates: Path) -> None:
    address = f"amqps://127.0.0.1:{tls_broker.tls_port}/"
    error = first_error(f"{address}?cafile={certificates}/ca.pem")
    assert "certificate (certfile, keyfile)" in error
    assert "AMQP 0-9-1" not in error
    unknown = first_error(
        f"{address}?certfile={certificates}/client.pem&keyfile={certificates}/client.key"
    )
    assert "certificate verify failed" in unknown.lower().replace("_", " ")


def test_a_mechanism_that_the_broker_does_not_offer_is_named(
    amqp_url: str, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pika.credentials

    from outbox.transports.rabbitmq import parameters

    external = pika.credentials.ExternalCredentials()
    monkeypatch.setattr(parameters, "_credentials", lambda _url: external)
    assert "does not offer the mechanism EXTERNAL" in first_error(amqp_url)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("cafile=/no/ca.pem", "cafile '/no/ca.pem'"),
        ("certfile=/no/client.pem&keyfile=/no/client.key", "certfile '/no/client.pem'"),
        ("auth=external", "needs a certfile"),
        ("auth=plain", "can only be 'external'"),
    ],
)
def test_a_wrong_option_or_a_missing_file_is_named(options: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Publisher(f"amqps://localhost/?{options}")


def test_a_key_that_does_not_fit_is_named(certificates: Path) -> None:
    options = f"certfile={certificates}/client.pem&keyfile={certificates}/server.key"
    with pytest.raises(UsageError, match=r"client.pem' and keyfile .*server.key'"):
        Publisher(f"amqps://localhost/?{options}")


def test_a_missing_vhost_is_named(amqp_url: str) -> None:
    error = first_error(f"{amqp_url.rpartition('/')[0]}/nowhere")
    assert "the user may not use this vhost, or it does not exist" in error
    assert "nowhere" in error
