"""From a trained network to a packed file, and what can be done with it."""
