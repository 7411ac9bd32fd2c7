"""Images and event recordings: `load.py` is the door; `from_tonic` takes what is in memory already."""

from empf.data.events import from_tonic as from_tonic
