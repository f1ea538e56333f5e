"""The backlog: the events that a publisher answers for until they have a fate."""
