"""Handlers in subprocesses, which can be killed on timeout (``--isolate process``)."""
