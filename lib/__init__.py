"""Machinery: each file is a room of its own. It imports `model`, `safedpo` and other files here, nothing else of ours."""
