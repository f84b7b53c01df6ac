"""Improvable gap balancing (IGB): weights from how far each loss is below its base loss."""
