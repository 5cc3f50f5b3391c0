"""Bytes moved by the CPU kernels against what the machine can move (``python -m bench roofline``)."""
