"""Running a model forward and backward while only one unit of it is in memory, and watching its layers."""
