"""Which layers scale against each other, for `equalize-layers`."""
