"""What train.py needs around its loop."""
