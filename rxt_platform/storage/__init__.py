"""Directories that are complete or absent: committed atomically, with a manifest and hashes."""
