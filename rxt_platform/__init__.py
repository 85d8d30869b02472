"""rxt_platform: trains Reactive Transformers, from a corpus to a measured conversation memory."""
