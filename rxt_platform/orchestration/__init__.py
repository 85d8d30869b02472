"""Ray and MLflow: the plan of steps, their runner, the training job on Ray Train, tracking."""
