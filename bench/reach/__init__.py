"""Public models that iterate to a fixed point, unmodified: what is found in each, how far off it is, and what a step costs."""
