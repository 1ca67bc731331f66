"""Plain torch: the CPU path and the oracle of every test. Each file computes one op, forward and backward."""
