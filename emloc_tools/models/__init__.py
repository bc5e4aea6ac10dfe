"""Base models: where they are, what their checkpoints hold, their linear layers, their data, and streaming them."""
