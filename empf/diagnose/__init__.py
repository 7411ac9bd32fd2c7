"""Looking into a network while it learns."""
