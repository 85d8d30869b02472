"""What the data commands show: rows looked at, checked and sampled before anything trains on them."""
