"""Teach Dynamo to hand over whole regions. This room knows Dynamo and nothing of solvers."""
