"""Figures in texts: every number of the README and of the site is filled in from a committed JSON file."""
