"""Reports: the documents that memc writes and prints, and the views of them. Everything here is a function of data."""
