"""The private names of pika that outbox uses are there; ``pika_connection`` lists them."""

from __future__ import annotations

import inspect
import socket
from typing import Any

import pika
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils import io_services_utils
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter

from outbox.transports.rabbitmq import pika_connection

OF_A_CONNECTION = {
    "_output_marshaled_frames",
    "_terminate_stream",
    "_proto_connection_made",
    "_adapter_emit_data",
    "_on_data_available",
    "_read_frame",
    "_frame_buffer",
    "_transport",
}
OF_A_TRANSPORT = {"_sock", "_MAX_RECV_BYTES", "_MAX_CONSUME_BYTES"}
OF_A_BLOCKING_CONNECTION = {"_impl", "_impl_class"}
OF_A_LOOP = {"_callbacks", "_poller", "_w_interrupt", "_dispatch_fd_events"}


def lacking(found: Any, names: set[str]) -> set[str]:
    return {name for name in names if not hasattr(found, name)}


def test_a_connection_has_them() -> None:
    loop = IOLoop()
    connection = pika.SelectConnection(custom_ioloop=loop, internal_connection_workflow=False)
    assert not lacking(connection, OF_A_CONNECTION)
    loop.close()


def test_a_transport_has_them() -> None:
    loop = IOLoop()
    kind: Any = io_services_utils._AsyncPlaintextTransport
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport = kind(ours, object(), SelectorIOServicesAdapter(loop))
        assert not lacking(transport, OF_A_TRANSPORT)
        transport.abort()
    loop.close()


def test_a_blocking_connection_has_them() -> None:
    assert "_impl_class" in inspect.signature(pika.BlockingConnection).parameters
    assert "self._impl " in inspect.getsource(pika.BlockingConnection.__init__)


def test_a_loop_has_them() -> None:
    loop = IOLoop()
    assert not lacking(loop, {"_callbacks", "_poller"})
    assert not lacking(loop._poller, {"_w_interrupt", "_dispatch_fd_events"})
    loop.close()


def test_all_of_them_are_listed_where_they_are_used() -> None:
    text = pika_connection.__doc__ or ""
    names = OF_A_CONNECTION | OF_A_TRANSPORT | OF_A_BLOCKING_CONNECTION | OF_A_LOOP
    assert {name for name in names if f"``{name}``" in text} == names
    assert len(names) == 17
    assert "seventeen" in text
