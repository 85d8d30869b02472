"""Memory reinforcement learning: what an answer is worth. No Ray, no DeepSpeed."""
