"""Teach Dynamo to hand over whole regions. This room knows Dynamo and nothing of solvers."""

from .install import OFF, features, install

__all__ = ["OFF", "features", "install"]
