"""A package, so that test files of other rooms may bear the same names."""
