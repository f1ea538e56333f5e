"""Middleware that makes each request a unit of work: ``wsgi`` and ``asgi``."""
