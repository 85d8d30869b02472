"""The engine: DeepSpeed, the step loop, resume states. Runs with or without Ray."""
