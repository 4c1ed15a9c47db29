"""The OpenAI-compatible router in front of replicas."""
