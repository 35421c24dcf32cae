"""The toy world, and what is measured in it."""
