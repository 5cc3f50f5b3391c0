"""Time and memory of a training step as the problem grows (``python -m bench scaling``)."""
