"""What training and the stages need, foreseen without allocating a weight: models of fake tensors, and arithmetic."""
