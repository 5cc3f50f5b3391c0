"""Regions at run time: solve, verify, differentiate. This room knows solvers and nothing of FX or Dynamo."""
