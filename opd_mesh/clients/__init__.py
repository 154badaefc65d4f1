"""Python clients of the four services: one class each, one method per RPC."""
