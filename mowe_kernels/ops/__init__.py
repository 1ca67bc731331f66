"""The ops: schema, shape checks, fake, autograd; computed by a backend."""
