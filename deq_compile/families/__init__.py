"""How fixed points are written by others: signatures of solvers, trials of them, backward code read off its source.

Nothing here knows Dynamo: a function goes in, what it means comes out.
"""
