"""Benchmarks and the demo; run from the repository with ``python -m bench``. Not part of the wheel."""
