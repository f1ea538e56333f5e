"""RabbitMQ over AMQP 0-9-1, with pika."""

from outbox.transports.rabbitmq.consuming import RabbitMQSubscription
from outbox.transports.rabbitmq.publishing import RabbitMQTransport
from outbox.transports.rabbitmq.replaying import RabbitMQParkedQueues

__all__ = ["RabbitMQParkedQueues", "RabbitMQSubscription", "RabbitMQTransport"]
