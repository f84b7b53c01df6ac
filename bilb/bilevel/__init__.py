"""Multi-task learning as bilevel optimisation: BiLB4MTL (LDC-MTL) and what it is made of."""
