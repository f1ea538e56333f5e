"""Recurring tasks: when they run, and what is published then. No I/O."""
