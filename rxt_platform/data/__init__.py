"""Data sources and the row types they yield."""
