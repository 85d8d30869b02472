"""Training stages, one file each: its loss and what it trains when. Pure torch."""
