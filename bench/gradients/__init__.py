"""The gradient study: how good each backward is, what it costs, and what a model trained with it is worth."""
