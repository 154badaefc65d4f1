"""gRPC plumbing shared by every server and client of the mesh."""
