"""OPD Mesh: multi-teacher on-policy distillation as a mesh of gRPC services.

This package is what every process shares, and the public Python SDK. Importing it imports neither torch nor gRPC.
"""

__version__ = "0.1.0"
