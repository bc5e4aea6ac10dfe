"""One function per stage: paths in, paths out, and a small record of the result."""
