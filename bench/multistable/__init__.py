"""Bodies with several fixed points: how often a compiled loop ends in another one than the loop does."""
