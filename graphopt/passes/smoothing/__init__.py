"""Where the activations of a matrix product can be scaled, for `smooth-activations`."""
