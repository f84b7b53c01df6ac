"""Loss balancing: the methods that read the losses alone, one file each."""
