"""AMQP 0-9-1 as bytes: encoding and decoding frames, properties and tables."""
