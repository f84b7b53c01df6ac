"""Aggregators: methods that must see every coordinate of every task's gradient."""
