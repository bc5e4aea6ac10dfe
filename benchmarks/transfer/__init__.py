"""The transfer bench: what a LoRA trained on an emulator, or another stand-in, is worth on the base."""
