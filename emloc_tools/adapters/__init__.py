"""What the tensors of an adapter mean on a base, and to the programs that serve it."""
