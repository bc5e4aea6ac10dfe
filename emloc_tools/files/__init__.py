"""Readers, writers and checks of the formats in `formats/`. Reading never unpickles and never executes anything."""
