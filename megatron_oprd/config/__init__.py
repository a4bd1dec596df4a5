"""A run's settings: the schema, how a file and the command line become it, and its checks."""
