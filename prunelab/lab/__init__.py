"""Widgets: stored results, the explorer of a model in memory, a training that can be watched, the schedule designer."""
