"""Gradient balancing: aggregators, their weightings and the solvers that they share."""
