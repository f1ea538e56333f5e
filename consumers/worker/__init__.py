"""The worker: takes messages from a subscription and runs them on threads and tasks."""
