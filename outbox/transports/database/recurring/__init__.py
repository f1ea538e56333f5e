"""Recurring tasks with a database as the broker: a row for each."""
