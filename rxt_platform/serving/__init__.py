"""The reward and critic service on Ray Serve, and its clients (DESIGN 11)."""
