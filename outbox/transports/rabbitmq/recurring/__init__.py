"""Recurring tasks over RabbitMQ: a queue with one message for each."""
