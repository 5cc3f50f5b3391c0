"""Batched tensor kernels; they know tensors and nothing else of the package."""
