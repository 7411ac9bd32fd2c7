"""Images and event recordings: `load.py` is the door."""
