"""Records of a run: counters, metrics, timelines, progress."""
