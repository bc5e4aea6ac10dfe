"""The numeric core: tensors in, tensors out. Symbols are those of `docs/mathematics.md`."""
