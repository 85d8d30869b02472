"""What was measured as tables, pictures and pages. No torch, and no part of what identifies a measurement."""
