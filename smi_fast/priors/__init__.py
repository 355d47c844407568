"""Image priors of the published dense methods, one a file; each is a term of the loss."""
