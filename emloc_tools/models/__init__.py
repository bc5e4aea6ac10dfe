"""Models: where they are, what their checkpoints hold, their layers and heads, and emulators as modules."""
