"""Private database servers, for tests and benchmarks of the durable outbox."""
