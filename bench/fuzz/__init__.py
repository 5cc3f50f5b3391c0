"""Random programs with loops in them, compiled and compared with eager float64."""
