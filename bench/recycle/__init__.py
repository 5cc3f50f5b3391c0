"""What factors of earlier batches save: evaluations and products over training, and the time of whole training steps."""
