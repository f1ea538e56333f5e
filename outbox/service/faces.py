"""What shows a service to the outside, as the options and the environment of its command say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from outbox.errors import UsageError
from outbox.service.http_options import add_http_options, http_face
from outbox.service.identity.identity_options import add_identity_options, identity_of
from outbox.service.identity.instance import Instance
from outbox.service.state import Face
from outbox.service.systemd import SystemdFace

__all__ = ["add_face_options", "faces_of"]


def add_face_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of what shows a service."""
    add_identity_options(group)
    add_http_options(group)


def faces_of(options: argparse.Namespace, applications: Sequence[str]) -> list[Face]:
    """Return what shows the service; empty if nothing does, and no parent is needed for it.

    Args:
        options: the parsed command line.
        applications: what identifies the application; see ``Identity``.

    Raises:
        UsageError: the id or the address can't be taken, or an option needs another.
    """
    identity = identity_of(options, applications)
    instance = None if identity is None else Instance(identity)
    try:
        http = http_face(options, may_wait=instance is not None and instance.shares_port)
    except UsageError:
        if instance is not None:
            instance.close()
        raise
    return [face for face in (instance, http, SystemdFace.inherited()) if face is not None]
