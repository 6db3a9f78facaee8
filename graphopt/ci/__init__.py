"""The regression gate around `compare`: figures that need no quiet machine, many models at once, history, bisection."""
