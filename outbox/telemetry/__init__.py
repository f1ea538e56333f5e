"""Telemetry: metrics for Prometheus, and the probes of a service."""
