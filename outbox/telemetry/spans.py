"""The spans of events and messages, by OpenTelemetry's conventions for messaging.

``docs/telemetry.md`` says which spans there are, and names the version of the conventions.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanKind,
    StatusCode,
    TracerProvider,
)

from outbox.backlog.chunk import Chunk, Entry, Fate
from outbox.errors import BrokerError, UsageError
from outbox.event import Event, make_event, set_headers
from outbox.messages.delivery import Delivery
from outbox.messages.headers import ATTEMPT, DELAYED, REPLAYED_AT, TRACEPARENT
from outbox.report import PublishReport
from outbox.settings import Settings
from outbox.system import process
from outbox.system.version import installed_version
from outbox.telemetry.trace_context import SAMPLED, headers_of_span, span_context_of
from outbox.telemetry.tracing import Processing
from outbox.url import BrokerURL

__all__ = ["SCHEMA_URL", "Parent", "SpanTracer"]

logger = logging.getLogger("outbox.telemetry")

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"

Parent: TypeAlias = Literal["auto", "always", "never"]

_LONGEST_WAIT = datetime.timedelta(seconds=60)
"""From the first failure to a later attempt that still belongs to the trace of the event."""
_MOST_LINKS = 128  # of a span, by the SDK's default
_MOST_BAGGAGE = 8192  # bytes, W3C Baggage, section 3.2.2
_BAGGAGE = "baggage"
_HEADERS = 6  # the place of the headers among the arguments of make_event()

_SUPPRESSED = "suppress_instrumentation"
# Instrumentations look at the API's own key, older ones at the plain name.
_HIDING = {_SUPPRESSED: True, getattr(contexts, "_SUPPRESS_INSTRUMENTATION_KEY", _SUPPRESSED): True}
_RECORDS_IF_PARENT_DOES = "remoteParentNotSampled:AlwaysOffSampler"


class SpanTracer:
    """Makes the spans of a process; see :class:`outbox.telemetry.tracing.Tracer`."""

    def __init__(
        self,
        provider: TracerProvider | None,
        *,
        create_spans: bool,
        parent: Parent,
        propagate_baggage: bool,
    ) -> None:
        """Make a tracer.

        Args:
            provider: the provider of its spans; None for the global one, also if that is set later.
            create_spans: whether each event gets a span when it is enqueued.
            parent: when an attempt's span is a child of the event's creation.
            propagate_baggage: whether events carry baggage.
        """
        self._provider = provider
        self._tracer = trace.get_tracer(
            "outbox", installed_version(), provider, schema_url=SCHEMA_URL
        )
        self._create_spans = create_spans
        self._parent = parent
        self._baggage = W3CBaggagePropagator() if propagate_baggage else None
        self._judged: tuple[object, bool] = None, False
        self._last: tuple[object, Mapping[str, str]] = None, {}
        self._sent_again: dict[Entry, _Write] = {}
        process.after_fork(self._sent_again.clear)

    def make_event(self, settings: Settings, *arguments: Any) -> Event:
        """Make an event that carries the context in force, unless it has a ``traceparent``."""
        headers = arguments[_HEADERS]
        if headers is None:
            headers = {}
        elif not isinstance(headers, Mapping) or TRACEPARENT in headers:
            return _marked(make_event(*arguments))
        span = self._created(settings, arguments[4], arguments[5]) if self._create_spans else None
        try:
            carried = self._carried(span or trace.get_current_span())
            if headers:
                changed = list(arguments)
                changed[_HEADERS] = {**headers, **carried}
                event = make_event(*changed)
            else:  # the usual case, in which nothing need be checked
                event = make_event(*arguments)
                if carried:
                    set_headers(event, {**carried})
        except Exception as error:
            if span is not None:
                _fail(span, error)
            raise
        else:
            if span is not None:
                span.set_attribute("messaging.message.id", event.id)
        finally:
            if span is not None:
                _end(span)
        return _marked(event)

    def sends(self, chunk: Chunk, settings: Settings) -> None:
        """Begin the span of a chunk, which ends with its report."""
        try:
            system = chunk.trace = _system_of(settings.url)
            if chunk.entries and not self._is_left_out(trace.get_current_span()):
                span = self._started([entry.event for entry in chunk.entries], system)
                chunk.trace = span, system
                chunk.on_reported(functools.partial(_on_reported, span))
        except Exception:
            logger.exception("could not begin the span of a chunk")

    def revoked(self, chunk: Chunk) -> None:
        """End the span of a chunk that was not handed in."""
        match getattr(chunk, "trace", None):
            case (Span() as span, _) if span.is_recording() and chunk.reported is None:
                span.set_status(StatusCode.ERROR, "handing over was interrupted")
                _end(span)

    def sends_again(self, entries: Sequence[Entry]) -> None:
        """Begin a span for those of ``entries`` that are kept, linked to their creation."""
        kept = [entry for entry in entries if entry.kept and entry not in self._sent_again]
        if not kept:
            return
        try:
            system: Any = getattr(kept[0].chunk, "trace", None) or _system_of(None)
            if isinstance(system, tuple):
                system = system[1]
            write = _Write(self._started([each.event for each in kept], system, Context()), kept)
            self._sent_again.update(dict.fromkeys(kept, write))
        except Exception:
            logger.exception("could not begin the span of kept events")

    def sent_again(self, entry: Entry, error: BrokerError | None) -> None:
        """End the span of kept events when the last of them has been answered."""
        write = self._sent_again.pop(entry, None)
        if write is not None:
            write.answered(entry, error)

    def processing(self, delivery: Delivery, settings: Settings, began: int = 0) -> Processing:
        """Begin the span of an attempt."""
        try:
            return self._processing(delivery, settings, began)
        except Exception:
            logger.exception("could not begin the span of a message")
            return _Untraced(trace.INVALID_SPAN)

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Suppress other instrumentations in this context."""
        present = contexts.get_current()
        contexts.attach(Context({**present, **_HIDING}))
        try:
            yield
        finally:
            contexts.attach(present)  # not detach(), which logs an error in another context

    def flush(self, seconds: float) -> None:
        """Have the provider export what has ended, within ``seconds``."""
        force_flush: Callable[[int], object] | None
        force_flush = getattr(self._provider_now(), "force_flush", None)
        if force_flush is None:
            return
        try:
            force_flush(round(1000 * seconds))
        except Exception:
            logger.exception("could not export the last spans")

    def _provider_now(self) -> TracerProvider:
        return self._provider or trace.get_tracer_provider()

    def _is_left_out(self, parent: Span) -> bool:
        """Return whether children of ``parent`` are certainly not recorded.

        Known of the SDK's usual samplers, which follow the parent. Then nothing need be made: the
        spans would be costly even so.
        """
        context = parent.get_span_context()
        if context.trace_flags & SAMPLED or not context.is_valid:
            return False
        provider = self._provider_now()
        if self._judged[0] is not provider:
            sampler = getattr(provider, "sampler", None)
            describe = getattr(sampler, "get_description", str)
            text = str(describe())
            follows = text.startswith("ParentBased{") and _RECORDS_IF_PARENT_DOES in text
            self._judged = provider, follows
        return self._judged[1]

    def _created(self, settings: Settings, target: Any, exchange: str) -> Span | None:
        """Begin the span of an event's creation; None if that fails."""
        try:
            return self._tracer.start_span(
                f"create {exchange or _DEFAULT_EXCHANGE}",
                kind=SpanKind.PRODUCER,
                attributes={
                    **_system_of(settings.url),
                    "messaging.operation.name": "create",
                    "messaging.operation.type": "create",
                    "messaging.destination.name": _joined(exchange, str(target)),
                    "messaging.rabbitmq.destination.routing_key": str(target),
                },
            )
        except Exception:
            logger.exception("could not begin the span of an event")
            return None

    def _carried(self, span: Span) -> Mapping[str, str]:
        """Return the headers that carry the context of ``span``, and the baggage."""
        context = span.get_span_context()
        last = self._last  # the events of a request have the same
        if last[0] is not context:
            last = self._last = context, headers_of_span(context) if context.is_valid else {}
        carried = last[1]
        if self._baggage is not None:
            baggage: dict[str, str] = {}
            self._baggage.inject(baggage)
            if len(baggage.get(_BAGGAGE, "")) <= _MOST_BAGGAGE:
                carried = {**carried, **baggage}
        return carried

    def _started(
        self, events: Sequence[Event], system: Mapping[str, Any], context: Context | None = None
    ) -> Span:
        """Begin a span for a write of ``events``, at least one."""
        exchange, target = events[0].exchange, events[0].target
        attributes: dict[str, Any] = {
            **system,
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
        }
        name = f"send {exchange or _DEFAULT_EXCHANGE}"
        if len(events) == 1:
            attributes["messaging.message.id"] = events[0].id
            is_same_target = True
        else:
            attributes["messaging.batch.message_count"] = len(events)
            is_same_target = all(event.target == target for event in events)
            if any(event.exchange != exchange for event in events):
                name, is_same_target, exchange = "send", False, ""
        if is_same_target:
            attributes["messaging.rabbitmq.destination.routing_key"] = target
        if destination := _joined(exchange, target if is_same_target else ""):
            attributes["messaging.destination.name"] = destination
        return self._tracer.start_span(
            name,
            context,
            SpanKind.PRODUCER if len(events) == 1 else SpanKind.CLIENT,
            attributes,
            _links_to(event.headers for event in events),
        )

    def _processing(self, delivery: Delivery, settings: Settings, began: int) -> Processing:
        headers = delivery.headers or {}
        created = span_context_of(headers)
        context = Context()
        if created is not None and self._is_parent_of(delivery, headers):
            parent = NonRecordingSpan(created)
            if self._is_left_out(parent):
                return _Untraced(parent)
            context = trace.set_span_in_context(parent, context)
        if self._baggage is not None and isinstance(headers.get(_BAGGAGE), str):
            context = self._baggage.extract({_BAGGAGE: headers[_BAGGAGE]}, context)
        exchange, target, queue = delivery.exchange, delivery.target, delivery.queue
        attributes: dict[str, Any] = {
            **_system_of(settings.url),
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": _joined(exchange, target, queue),
            "messaging.rabbitmq.destination.routing_key": target,
            "messaging.message.id": delivery.message_id or "",
            "messaging.message.body.size": len(delivery.body),
        }
        if headers and (attempt := delivery.attempt) > 1:
            attributes["outbox.attempt"] = attempt
        span = self._tracer.start_span(
            f"process {queue}",
            context,
            SpanKind.CONSUMER,
            attributes,
            () if created is None else (Link(created),),
            began or None,
        )
        return _Attempt(span, context)

    def _is_parent_of(self, delivery: Delivery, headers: Mapping[str, Any]) -> bool:
        """Return whether the attempt belongs to the trace in which the event was created."""
        if self._parent != "auto":
            return self._parent == "always"
        if DELAYED in headers or REPLAYED_AT in headers:
            return False
        first_failure = delivery.first_failure if ATTEMPT in headers else None
        if first_failure is None:
            return True
        return datetime.datetime.now(datetime.UTC) - first_failure <= _LONGEST_WAIT


class _Write:
    """The span of kept events that are being sent. For the publisher's thread."""

    __slots__ = ("_error", "_span", "_waiting")

    def __init__(self, span: Span, entries: Sequence[Entry]) -> None:
        self._span = span
        self._waiting = set(entries)
        self._error: str | None = None

    def answered(self, entry: Entry, error: BrokerError | None) -> None:
        """Note that ``entry`` has been answered; end the span with the last one."""
        self._waiting.discard(entry)
        if error is not None:
            self._error = _name_of(error)
        elif entry.fate in (Fate.REJECTED, Fate.WITHDRAWN):
            self._error = entry.fate.value
        if not self._waiting:
            if self._error is not None:
                _mark_failed(self._span, self._error)
            _end(self._span)


class _Attempt:
    """An attempt that has a span."""

    __slots__ = ("_context", "_span", "_to_end")

    def __init__(self, span: Span, context: Context) -> None:
        self._span = span
        self._context = context  # it may hold baggage
        self._to_end = [None]

    def enter(self) -> None:
        contexts.attach(
            trace.set_span_in_context(
                self._span, Context({**contexts.get_current(), **self._context})
            )
        )

    def end(self, outcome: str, error: BaseException | None = None, reason: str = "") -> None:
        try:
            self._to_end.pop()
        except IndexError:  # another thread was faster, or it is known already
            return
        span = self._span
        span.set_attribute("outbox.outcome", outcome)
        if error is not None:
            _fail(span, error)
        elif reason:
            _mark_failed(span, outcome, reason)
        _end(span)


class _Untraced:
    """An attempt without a span, whose events carry on the context of the message."""

    __slots__ = ("_parent",)

    def __init__(self, parent: Span) -> None:
        self._parent = parent

    def enter(self) -> None:
        contexts.attach(trace.set_span_in_context(self._parent))

    def end(self, outcome: str, error: BaseException | None = None, reason: str = "") -> None:
        """Do nothing: there is no span."""


_DEFAULT_EXCHANGE = "amq.default"


def _joined(*parts: str) -> str:
    """Return the name of a destination: the parts that aren't empty, equal neighbours once."""
    names: list[str] = []
    for part in parts:
        if part and (not names or names[-1] != part):
            names.append(part)
    return ":".join(names)


@functools.lru_cache(maxsize=64)
def _system_of(url: str | None) -> Mapping[str, Any]:
    """Return the attributes of a broker: the system, and its address if there is only one."""
    if url is None:
        return {"messaging.system": "outbox"}
    try:
        broker = BrokerURL.parse(url)
    except UsageError:
        return {"messaging.system": "outbox"}
    if not broker.scheme.startswith("amqp"):
        return {"messaging.system": "outbox"}
    attributes: dict[str, Any] = {"messaging.system": "rabbitmq"}
    if len(broker.hosts) == 1:
        attributes["server.address"], attributes["server.port"] = broker.hosts[0]
    return attributes


def _links_to(tables: Iterable[Mapping[str, Any]]) -> list[Link]:
    """Return links to the distinct contexts in which events with these headers were created."""
    links: dict[str, Link | None] = {}
    for headers in tables:
        traceparent = headers.get(TRACEPARENT)
        if type(traceparent) is str and traceparent not in links:
            created = span_context_of(headers)
            links[traceparent] = None if created is None else Link(created)
            if len(links) == _MOST_LINKS:
                break
    return [link for link in links.values() if link is not None]


def _on_reported(span: Span, report: PublishReport) -> None:
    try:
        for fate in ("kept", "parked", "ignored", "rejected"):
            count = len(getattr(report, fate))
            if count:
                span.set_attribute(f"outbox.{fate}", count)
        if report.error is not None:
            _mark_failed(span, _name_of(report.error), str(report.error))
        elif report.rejected:
            _mark_failed(span, "rejected", report.rejected[0].reason)
        if span.is_recording():
            span.end()
    except Exception:
        logger.exception("could not end the span of a chunk")


def _marked(event: Event) -> Event:
    """Mark a delayed event: how long it has waited doesn't show where it is processed."""
    headers = event.headers
    if event.deliver_at is not None and TRACEPARENT in headers and isinstance(headers, dict):
        headers[DELAYED] = True  # it was made for this event alone, just now
    return event


def _end(span: Span) -> None:
    """End a span; an application's processor of spans may fail, which must stop nothing else."""
    try:
        span.end()
    except Exception:
        logger.exception("could not end a span")


def _fail(span: Span, error: BaseException) -> None:
    name = getattr(error, "kind", None) or _name_of(error)
    text = _text_of(error)
    try:
        span.record_exception(error)
    except Exception:  # it wants the text as well
        logger.debug("could not record an exception", exc_info=True)
    _mark_failed(span, str(name), text)


def _mark_failed(span: Span, error_type: str, text: str = "") -> None:
    span.set_attribute("error.type", error_type)
    span.set_status(StatusCode.ERROR, text or error_type)


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an application's exception may fail even there
        return ""


def _name_of(error: BaseException) -> str:
    kind = type(error)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"
