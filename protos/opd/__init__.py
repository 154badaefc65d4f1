"""Generated protobuf modules of OPD Mesh."""
