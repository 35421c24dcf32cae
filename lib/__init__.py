"""Machinery, each file a room of its own. Of our files it imports model, safedpo and lib only."""
