"""The Reactive Transformer as pure torch: no Ray, no DeepSpeed, no conversation state in any module."""
