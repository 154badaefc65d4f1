"""Recipes and service configurations: pydantic models over YAML. Imports no torch, and a test says so."""
