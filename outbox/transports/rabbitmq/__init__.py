"""RabbitMQ over AMQP 0-9-1, with pika."""

from outbox.transports.rabbitmq.parked_queues import RabbitMQParkedQueues as ParkedQueues
from outbox.transports.rabbitmq.recurring.tick_records import RabbitMQTickRecords as TickRecords
from outbox.transports.rabbitmq.recurring.ticker import RabbitMQTicker as Ticker
from outbox.transports.rabbitmq.subscription import RabbitMQSubscription as Subscription
from outbox.transports.rabbitmq.transport import RabbitMQTransport as Transport

__all__ = ["ParkedQueues", "Subscription", "TickRecords", "Ticker", "Transport"]
