"""The student's generation: engine, requests, service."""
