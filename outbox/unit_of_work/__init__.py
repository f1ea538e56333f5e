"""The unit of work: where events wait until their work has succeeded."""
