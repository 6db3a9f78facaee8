"""One artifact for many sizes: a function for each of several, and a proof of what may be padded up to the next."""
