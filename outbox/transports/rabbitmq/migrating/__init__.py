"""Messages that are moved from or to a RabbitMQ: its queues as a source, and their creation."""
