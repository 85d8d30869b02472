"""What a run is: typed configuration, loaded from one YAML file and validated whole. No torch, no Ray."""
