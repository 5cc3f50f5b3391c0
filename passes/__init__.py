"""Graph passes: find the fixed-point regions of an FX graph and replace each by one node. They know nothing of solvers."""
