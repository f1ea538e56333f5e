"""Tasks in a worker: the table of what may be called, and the consumers of their queues."""
