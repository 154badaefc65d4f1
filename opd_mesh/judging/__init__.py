"""Judging by rubrics: what a judge is asked, how it answers, and what follows from it. No torch, no gRPC."""
