"""The village, an invented world, and what is measured in it."""
