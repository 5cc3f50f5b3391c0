"""An equilibrium language model, trained on this project's own notes, as a user would run it, against backend="deq"."""
