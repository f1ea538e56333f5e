"""The headers ``traceparent`` and ``tracestate`` (W3C Trace Context, level 1), read and written.

Headers come from anywhere, and may hold anything: what isn't valid counts as missing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from opentelemetry.trace import SpanContext, TraceFlags, TraceState

from outbox.messages.headers import TRACEPARENT

__all__ = ["SAMPLED", "headers_of_span", "span_context_of"]

_TRACESTATE = "tracestate"
SAMPLED = int(TraceFlags.SAMPLED)

# A later version may add fields behind a hyphen; version 00 has none.
_FORM = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)


def span_context_of(headers: Mapping[str, Any]) -> SpanContext | None:
    """Return the context in which an event was created, or None if its headers have none."""
    traceparent = headers.get(TRACEPARENT)
    if type(traceparent) is not str:
        return None
    tracestate = headers.get(_TRACESTATE)
    return _parsed(traceparent, tracestate if type(tracestate) is str else "")


@functools.lru_cache(maxsize=512)  # events that were enqueued together have the same
def _parsed(traceparent: str, tracestate: str) -> SpanContext | None:
    match = _FORM.fullmatch(traceparent)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if more is not None and version == "00":
        return None
    return SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16)),
        trace_state=TraceState.from_header([tracestate]) if tracestate else None,
    )


def headers_of_span(context: SpanContext) -> dict[str, str]:
    """Return the headers that carry ``context``, a valid one."""
    flags = context.trace_flags
    headers = {TRACEPARENT: f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"}
    if context.trace_state:
        headers[_TRACESTATE] = context.trace_state.to_header()
    return headers
