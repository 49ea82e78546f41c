"""One folder an operation: interface (checks, choice), reference (the definition), autograd (registered op), one file a backend."""
