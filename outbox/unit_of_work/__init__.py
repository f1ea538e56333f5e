"""The unit of work: where events wait until it is known that their work has succeeded."""
