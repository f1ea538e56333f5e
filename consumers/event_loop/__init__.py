"""The event loop that asynchronous handlers run on, and a watch over it."""
