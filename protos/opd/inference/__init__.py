"""Generated protobuf modules of the Open Inference Protocol."""
