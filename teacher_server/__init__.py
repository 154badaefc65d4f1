"""Frozen teachers: engines, queue, service."""
