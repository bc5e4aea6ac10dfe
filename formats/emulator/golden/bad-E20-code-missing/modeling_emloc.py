"""In a real emulator: the model class with low-rank layers. No reader of the format runs it."""
