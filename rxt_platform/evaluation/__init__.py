"""Measurements: answer tokens, memory retention, baselines, and the report. Pure torch."""
