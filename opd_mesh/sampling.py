"""The one sampler that rollout server and trainer share."""

from rollout_server.sampling import sample_tokens

__all__ = ["sample_tokens"]
